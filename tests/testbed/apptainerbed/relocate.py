"""From unpacked packages to a folder with an Apptainer that runs here.

Apptainer finds its files from where its program lies, so it may be moved as a whole. Two obstacles remain.
Its programs ask for a newer libc: they are given the one beside them. And Debian keeps its helper ``starter``
one folder deeper than the code expects, which then takes ``lib`` for the prefix: links mend that.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from .debs import must
from .layout import Layout

LIBRARIES = ("libc.so.6", "libseccomp.so.2", "libsqlite3.so.0")

# linux/capability.h, in the order of their bits
CAPABILITIES = """\
chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable
net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot
sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease
audit_write audit_control setfcap mac_override mac_admin syslog wake_alarm block_suspend audit_read
perfmon bpf checkpoint_restore"""

WRAPPER = """\
#!/bin/bash
# Root's containers are given every capability, and Apptainer fails where root itself lacks one, as in many
# virtual machines. So those are named as dropped. A build strips APPTAINER_* from the environment but starts
# this file again for %post: that is why it is a wrapper.
if ((EUID == 0)); then
  lacking=()
  held=0x$(sed -n 's/^CapPrm:[[:space:]]*//p' /proc/self/status)
  bit=0
  for name in {capabilities}; do
    ((held >> bit++ & 1)) || lacking+=("CAP_${{name^^}}")
  done
  if ((${{#lacking[@]}})); then
    APPTAINER_DROP_CAPS=$(IFS=,; echo "${{lacking[*]}}")
    export APPTAINER_DROP_CAPS
  fi
fi
exec {program} "$@"
"""


def assemble(unpacked: Path, newer: Path, layout: Layout) -> None:
    """Writes the folder from the unpacked apptainer package and the unpacked newer libraries."""
    prefix = layout.prefix
    shutil.rmtree(prefix, ignore_errors=True)
    layout.real_program.parent.mkdir(parents=True)
    layout.mark.touch()
    for folder in ("usr/lib", "etc", "var"):
        if (unpacked / folder).is_dir():
            shutil.copytree(unpacked / folder, prefix / Path(folder).name, symlinks=True)
    shutil.copy2(unpacked / "usr/bin/apptainer", layout.real_program)
    _copy_libraries(newer, layout.libc)
    (starter,) = (prefix / "lib").glob("**/apptainer/bin/starter")
    _use_own_libc([layout.real_program, starter], layout.libc)
    _mend_prefix(starter, prefix)
    layout.program.parent.mkdir()
    layout.program.write_text(
        WRAPPER.format(capabilities=" ".join(CAPABILITIES.split()), program=layout.real_program)
    )
    layout.program.chmod(0o755)
    (layout.program.parent / "singularity").symlink_to(layout.program.name)


def _copy_libraries(newer: Path, folder: Path) -> None:
    folder.mkdir()
    for name in LIBRARIES:
        found = next(iter(sorted(newer.glob(f"**/{name}"))))
        for library in found.parent.glob("*.so*"):
            if not (folder / library.name).exists():
                shutil.copy2(library, folder, follow_symlinks=True)


def _use_own_libc(programs: Sequence[Path], libc: Path) -> None:
    loader = Path(must(["patchelf", "--print-interpreter", programs[0]], "cannot read the program").strip())
    for program in programs:
        words = ["--set-interpreter", libc / loader.name, "--force-rpath", "--set-rpath", libc]
        must(["patchelf", *words, program], "cannot change the program")


def _mend_prefix(starter: Path, prefix: Path) -> None:
    """Makes the folder that the starter takes for the prefix look like the prefix."""
    taken_for_prefix = starter.parents[3]
    if taken_for_prefix == prefix:
        return
    for name in ("bin", "etc", "var"):
        (taken_for_prefix / name).symlink_to(prefix / name)
    libexec = starter.parents[2]  # such as lib/x86_64-linux-gnu: looked for as lib/lib/x86_64-linux-gnu
    (taken_for_prefix / libexec.parent.name).symlink_to(taken_for_prefix)
