"""The oldest versions that setup.cfg allows, as pip constraints for `make test-oldest`.

    python tests/support/oldest.py > oldest.txt

setup.cfg is the only place where these versions stand: `name>=1.2` becomes `name==1.2`. Indirect
dependencies may be as old as pip finds fit, but no newer than in constraints.txt: a new release
changes no result.
"""

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<extras>\[.*?\])?(?P<versions>[^;]*)(;.*)?")


def canonical(name: str) -> str:
    """The name of a distribution as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(setup: Path = ROOT / "setup.cfg") -> dict[str, dict[str, str]]:
    """Versions by distribution name: install_requires under "", each extra under its own name."""
    config = configparser.ConfigParser()
    config.read(setup, encoding="utf-8")
    texts = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    found: dict[str, dict[str, str]] = {}
    for part, text in texts.items():
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
        matches = {line: REQUIREMENT.fullmatch(line) for line in lines if line}
        unread = [line for line, match in matches.items() if match is None]
        if unread:
            raise ValueError(f"setup.cfg asks for {unread}; allowed: name>=version")
        read = [match for match in matches.values() if match is not None and not match["extras"]]
        found[part] = {canonical(match["name"]): match["versions"].strip() for match in read}
    return found


def oldest_versions() -> dict[str, str]:
    """The lower bound of each direct dependency, test tools apart; ValueError if one has none."""
    parts = [versions for part, versions in declared().items() if part != "test"]
    versions = {name: text for part in parts for name, text in part.items()}
    bounds = {name: re.search(r">=\s*([\w.]+)", text) for name, text in versions.items()}
    missing = [name for name, bound in bounds.items() if bound is None]
    if missing:
        raise ValueError(f"setup.cfg has no lower bound for {', '.join(missing)}; it must say name>=version")
    return {name: bound[1] for name, bound in bounds.items() if bound is not None}


def constraints() -> list[str]:
    """The lines of a file for `pip install -c`."""
    oldest = oldest_versions()
    tested = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    others = [f"{name}<={version}" for name, version in tested if canonical(name) not in oldest]
    return [f"{name}=={version}" for name, version in oldest.items()] + others


if __name__ == "__main__":
    print("\n".join(constraints()))
