"""The verbs ``container check``, ``container def`` and ``container build``."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpcsngd.cli.arguments import AS_JSON, SITE
from hpcsngd.cli.output import print_json
from hpcsngd.errors import EXIT_PREFLIGHT

if TYPE_CHECKING:
    from hpcsngd.config.site import Container, ImageBuild
    from hpcsngd.launch.images.definition import Request
    from hpcsngd.launch.images.sif import Sif

FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def container() -> None:
    """Images: write definitions, build them, and see what is in one."""


def _choice(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that say which image is meant."""
    for option in reversed(
        (
            click.option("--site", type=SITE, help="Take base, architecture and build options from a site."),
            click.option("--base", help="debian, cuda, cuda-ppc64le, rocm or local; default: the site's."),
            click.option("--arch", help="x86_64, aarch64 or ppc64le, or Debian's names for them."),
            click.option("--parent", help="Image to start from: in a registry, or a file for --base local."),
            click.option("--mirror", help="Debian mirror; default: the one that apt here uses."),
            click.option("--pin", "pins", multiple=True, metavar="NAME=VERSION", help="Another version."),
            click.option(
                "--code",
                type=click.Choice(["image", "bind"]),
                help="hpcsngd inside the image, or bound over it at run time; default: the site's, or image.",
            ),
        )
    ):
        command = option(command)
    return command


@container.command("def")
@_choice
@click.option("--out", type=FILE, help="Write it here, with hpcsngd's wheel beside it; default: print it.")
def define(*, out: Path | None, **choice: Any) -> None:
    """Write a complete definition file.

    Build it with: cd FOLDER && apptainer build --force IMAGE.sif FILE.def
    """
    from hpcsngd.launch.images import code
    from hpcsngd.launch.images.definition import render

    _, request = _request(**choice)
    text = render(request)
    if out is None:
        click.echo(text, nl=False)
        return
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        raise click.UsageError(f"--out {out}: there is no folder {out.absolute().parent} that can be written")
    out.write_text(text, encoding="utf-8")
    if request.code == "image":
        wheel = code.write_wheel(out.absolute().parent)
        click.echo(f"{wheel}: hpcsngd for the image", err=True)
    folder = shlex.quote(str(out.absolute().parent))
    needed = request.machine.kernel
    where = (
        "" if needed == platform.machine() else f" on a {needed} machine (hpcsngd container build uses qemu)"
    )
    click.echo(f"{out}: build it{where} with")
    click.echo(f"  cd {folder} && apptainer build --force IMAGE.sif {shlex.quote(out.name)}")


@container.command()
@click.argument("image", type=FILE, required=False)
@_choice
@click.option(
    "--runtime", type=click.Choice(["auto", "apptainer", "singularity"]), help="Default: the site's."
)
@click.option("--how", type=click.Choice(["plain", "fakeroot", "remote"]), help="Default: the site's.")
@click.option("--bind", "binds", multiple=True, help="Bind mount while building; repeatable.")
@click.option("--build-arg", "args", multiple=True, help="More for the runtime's build; repeatable.")
@click.option("--compression", type=click.Choice(["gzip", "zstd"]), help="Default: the site's, or gzip.")
@click.option("--force", is_flag=True, help="Replace an image that is there, once the new one is complete.")
@click.option("--dry-run", is_flag=True, help="Print definition and command; build nothing.")
@click.option("--quiet", is_flag=True, help="Show nothing of the build; the log has it.")
def build(
    *,
    image: Path | None,
    runtime: str | None,
    how: str | None,
    binds: Sequence[str],
    args: Sequence[str],
    compression: str | None,
    force: bool,
    dry_run: bool,
    quiet: bool,
    **choice: Any,
) -> None:
    """Build an image, at IMAGE or where the site expects it.

    A log is kept beside it (IMAGE.log). A build that fails leaves no half image and an older one as it was.
    """
    from hpcsngd.config.site import ImageBuild
    from hpcsngd.launch.images import build as builder

    settings, request = _request(**choice)
    given = settings.build if settings else ImageBuild()
    changes = {"how": how, "compression": compression}
    options = given.model_copy(
        update={
            **{name: value for name, value in changes.items() if value},
            "tmp": _expanded(given.tmp, "container.build.tmp"),
            "binds": [*_all_expanded(given.binds, "container.build.binds"), *binds],
            "args": [*_all_expanded(given.args, "container.build.args"), *args],
        }
    )
    asked = runtime or (settings.runtime if settings else "auto")
    target = image or _image_of(settings)
    if dry_run:
        name = builder.RUNTIMES[0] if asked == "auto" else asked
        planned = builder.Job(request, target, name, options, force)
        click.echo(builder.show(planned, machine=platform.machine()))
        return
    job = builder.Job(request, target, builder.find_runtime(asked), options, force)
    with _progress(quiet=quiet) as on_line:
        took_s = builder.build(job, machine=platform.machine(), on_line=on_line)
    click.echo(f"{target}: {target.stat().st_size / 1e6:.0f} MB in {took_s:.0f} s; log: {job.log}")


@container.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--site", type=SITE, help="Compare with this site, too.")
@AS_JSON
def check(*, image: Path, site: str | None, as_json: bool) -> None:
    """Say what an image is, from its file alone; no runtime needed.

    Ends with 3 if it would not work: on this machine, or on the site's nodes.
    """
    from hpcsngd.config.resolve import load_site
    from hpcsngd.errors import ConfigError
    from hpcsngd.launch.images import check as checks
    from hpcsngd.launch.images import sif

    if not image.is_file():
        what = "a folder (a sandbox?), not an image file" if image.is_dir() else "not there"
        raise ConfigError(f"{image} is {what}")
    found = sif.read(image)
    where = load_site(site) if site else None
    settings = where.container if where else None
    problems = checks.problems(
        found,
        arch=where.arch if where else platform.machine(),
        code=settings.code if settings else "image",
        site=site or "SITE",
    )
    if as_json:
        print_json({"path": str(image), **checks.to_record(found), "problems": problems})
    else:
        _print_image(image, found, problems, site)
    if problems:
        raise SystemExit(EXIT_PREFLIGHT)


def _print_image(image: Path, found: Sif, problems: list[str], site: str | None) -> None:
    rows = {
        "architecture": found.arch,
        "created": f"{found.created:%Y-%m-%d %H:%M:%S} UTC",
        "id": found.id,
        "size": f"{found.size_bytes / 1e6:.0f} MB",
        "signatures": f"{found.signatures} (not verified: apptainer verify)",
    }
    click.echo(str(image))
    for name, value in rows.items():
        click.echo(f"  {name:<13} {value}")
    if found.labels is None:
        click.echo("  labels        only inside its file system: apptainer inspect reads them")
    for name, value in sorted((found.labels or {}).items()):
        click.echo(f"  {name} = {value}")
    for problem in problems:
        click.echo(f"problem: {problem}", err=True)
    if not problems:
        click.echo(f"fits {f'site {site}' if site else 'this machine'}")


def _request(
    *,
    site: str | None,
    base: str | None,
    arch: str | None,
    parent: str | None,
    mirror: str | None,
    pins: Sequence[str],
    code: str | None,
) -> tuple[Container | None, Request]:
    """Returns the site's container section and what the options ask for."""
    from hpcsngd.config.resolve import load_site
    from hpcsngd.config.site import ImageBuild
    from hpcsngd.launch.images import bases, definition, machines

    where = load_site(site) if site else None
    if where is None and base is None:
        raise click.UsageError("give --site, or --base (and --arch)")
    settings = where.container if where else None
    given = settings.build if settings else ImageBuild()
    chosen = base or (bases.for_site(site or "", where) if where else "")
    machine = machines.find(arch) if arch else bases.arch_of(where, platform.machine()) if where else None
    wanted = code or (settings.code if settings else "image")
    request = definition.Request(
        base=chosen,
        machine=machine or machines.find(platform.machine()),
        code="bind" if wanted == "bind" else "image",
        parent=parent or _expanded(given.parent, "container.build.parent"),
        pins={**_site_pins(given), **_pins(pins)},
        mirror=mirror or _expanded(given.mirror, "container.build.mirror") or definition.apt_mirror(),
    )
    return settings, request


def _site_pins(given: ImageBuild) -> dict[str, str]:
    return dict(zip(given.pins, _all_expanded(given.pins.values(), "container.build.pins"), strict=True))


def _pins(words: Sequence[str]) -> dict[str, str]:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise click.UsageError(f"--pin {word}: expected NAME=VERSION, such as TORCH=2.6.0")
        found[name.upper()] = value
    return found


def _image_of(settings: Container | None) -> Path:
    image = _expanded(settings.image if settings else None, "container.image")
    if image is None:
        raise click.UsageError("where to? Give IMAGE, or a --site with container.image in its file")
    return Path(image).expanduser()


def _expanded(text: str | None, where: str) -> str | None:
    return None if text is None else _all_expanded([text], where)[0]


def _all_expanded(texts: Iterable[str], where: str) -> list[str]:
    """Returns what a site file says with its ``${NAME}`` filled in; only what is used has to be set."""
    from hpcsngd.config.fields import expand

    return [expand(text, os.environ, where) for text in texts]


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yields what is told each line of a build: the last one on a terminal, the runtime's own otherwise."""
    if quiet:
        yield lambda line: None
    elif sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("building") as status:
            yield lambda line: status.update(f"building: {_plain(line)}")
    else:
        yield _echo_milestone


def _echo_milestone(line: str) -> None:
    """Prints what the runtime says itself, not what the commands in the image print."""
    if line.startswith(("INFO", "WARN", "FATAL")):
        click.echo(line, err=True, nl=False)


def _plain(line: str) -> str:
    """Returns a line that fits a terminal and that rich does not read as markup."""
    from rich.markup import escape

    return escape(line.strip()[:90])
