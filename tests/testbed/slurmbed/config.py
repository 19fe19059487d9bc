"""The configuration files as text: pure functions, no file is touched here.

The settings make a small machine look like a busy site (many CPUs, GPUs, a preempting partition) and make
its delays short enough for tests. The reason for each surprising line stands in the rendered file itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from .layout import ACCOUNTING_PORT, CONTROLLER_PORT, NODE_PORT_BASE, Layout, Shape

SLURM_CONF = """\
ClusterName=hpcsngd
SlurmctldHost={login}({address})
SlurmctldPort={controller_port}
SlurmUser=root
# A requeued job waits until its old credential has expired, by default two minutes.
AuthInfo=socket={munge},cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/spool/slurmctld.pid
SlurmdPidFile={root}/spool/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
# So that no later cluster hands out the same ids: submitit takes a result by its job id.
FirstJobId={first_job_id}

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={address}
AccountingStoragePort={accounting_port}
# With slurmdbd, clients take the munge socket from here and not from AuthInfo.
AccountingStoragePass={munge}
JobAcctGatherType=jobacct_gather/linux

# No cgroups and no binding; CPUs and memory are as written below, whatever the machine has.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
MailProg=/bin/true

# Short delays; but patience with a machine that is busy with other tests.
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
KillWait=5
MessageTimeout=30
ReturnToService=2

# As on real sites: a request beyond a partition's limits is refused at once, not left pending.
EnforcePartLimits=ALL
# Slurm's own default: whoever wants a whole step to end with one task has to ask srun for it.
KillOnBadExit=0
# A preempted job gets the signal of its --signal option, or SIGTERM; GraceTime later it is killed.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

{gres}
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30
PartitionName=short Nodes=ALL MaxTime=00:05:00 MaxNodes=1 PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""

SLURMDBD_CONF = """\
DbdHost={login}
DbdAddr={address}
DbdPort={accounting_port}
SlurmUser=root
AuthInfo=socket={munge}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
PidFile={root}/spool/slurmdbd.pid
LogFile={root}/log/slurmdbd.log
"""

# Unused, but slurmd loads a cgroup plugin all the same, and its search for the right one fails on machines
# with both cgroup versions or none mounted.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"


@dataclass(frozen=True)
class Site:
    """One cluster on one machine: all that the files depend on.

    Args:
        layout: Paths and addresses.
        shape: Numbers of nodes, CPUs and GPUs.
        login: The machine's short host name.
        network: ``netns`` (nodes with own addresses and names) or ``loopback`` (all share the machine's).
    """

    layout: Layout
    shape: Shape
    login: str
    network: str

    @property
    def login_address(self) -> str:
        """The address at which the nodes reach the login node."""
        return "127.0.0.1" if self.network == "loopback" else f"{self.layout.net}.254"

    def node_address(self, index: int) -> str:
        """Returns the address of node ``index`` (from 1)."""
        return "127.0.0.1" if self.network == "loopback" else f"{self.layout.net}.{index}"


def slurm_conf(site: Site, first_job_id: int) -> str:
    """Returns slurm.conf, the same text for the login node and all nodes."""
    gres = "GresTypes=gpu\nAccountingStorageTRES=gres/gpu" if site.shape.gpus else ""
    return SLURM_CONF.format(
        login=site.login,
        address=site.login_address,
        controller_port=CONTROLLER_PORT,
        accounting_port=ACCOUNTING_PORT,
        munge=site.layout.munge_socket,
        root=site.layout.root,
        first_job_id=first_job_id,
        gres=gres,
        nodes="\n".join(_node_line(site, index) for index in range(1, site.shape.nodes + 1)),
    )


def _node_line(site: Site, index: int) -> str:
    name = site.shape.node_names[index - 1]
    host = site.login if site.network == "loopback" else name
    gpus = f" Gres=gpu:{site.shape.gpus}" if site.shape.gpus else ""
    where = f"NodeHostname={host} NodeAddr={site.node_address(index)} Port={NODE_PORT_BASE + index}"
    # the first free nodes are taken, so that a test knows which of more nodes than it needs is the spare
    return f"NodeName={name} {where} CPUs={site.shape.cpus} RealMemory=1000000 Weight={index}{gpus}"


def slurmdbd_conf(site: Site) -> str:
    """Returns slurmdbd.conf; slurmdbd finds its database through ``MYSQL_UNIX_PORT``."""
    return SLURMDBD_CONF.format(
        login=site.login,
        address=site.login_address,
        accounting_port=ACCOUNTING_PORT,
        munge=site.layout.munge_socket,
        root=site.layout.root,
    )


def gres_conf(layout: Layout, gpus: int) -> str:
    """Returns gres.conf; a count without device files is not accepted, so each GPU has one."""
    return f"Name=gpu File={layout.root}/dev/gpu[0-{gpus - 1}]\n" if gpus else ""


def node_entries(site: Site) -> list[str]:
    """Returns one line for a hosts file per node."""
    return [f"{site.node_address(index)} {name}" for index, name in enumerate(site.shape.node_names, start=1)]


def node_hosts(site: Site) -> str:
    """Returns the nodes' /etc/hosts.

    The login node stands there with the address of the bridge. Many machines' own hosts file gives their name
    a loopback address, which a node would take for itself.
    """
    lines = ["127.0.0.1 localhost", f"{site.login_address} {site.login}", *node_entries(site)]
    return "\n".join(lines) + "\n"
