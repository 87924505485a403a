"""Where a section's figures come from: the file, the machine, the software, the commit, the date."""

from __future__ import annotations

from flashtile.bench.environment import Environment

INTERRUPTED = "The run was interrupted: only what was finished until then is here."


def origin(source: str, environment: Environment, created_utc: str) -> str:
    """One line: the file, the day, the commit, the two versions that matter most."""
    versions = [
        f"{name} {environment.versions[name]}" for name in ("flashtile", "torch") if name in environment.versions
    ]
    commit = "no known commit" if environment.commit is None else f"commit {environment.commit[:12]}"
    return " · ".join([source, created_utc[:10], commit + _changes(environment), *versions])


def facts(source: str, environment: Environment, created_utc: str) -> dict[str, str]:
    """Everything that a results file says about where it was made."""
    return {
        "results file": source,
        "measured": created_utc.replace("T", " "),
        "device": environment.device_name,
        "host": f"{environment.platform}, {environment.num_threads} torch threads",
        "software": ", ".join(f"{name} {version}" for name, version in environment.versions.items()),
        "commit": ("not known" if environment.commit is None else environment.commit) + _changes(environment),
    }


def _changes(environment: Environment) -> str:
    return " with changes on top" if environment.commit_is_dirty else ""
