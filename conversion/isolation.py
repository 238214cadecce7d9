"""Run a worker in a process of its own: no network, no tokens, an empty working directory, and caches of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import guarded_start

# All that a worker sees of the caller's environment: where Python and its libraries are, and how to use this machine.
PASSED_ON = frozenset(
    {
        "COMSPEC",
        "CONDA_PREFIX",
        "CUDA_VISIBLE_DEVICES",
        "DYLD_LIBRARY_PATH",
        "LANG",
        "LANGUAGE",
        "LD_LIBRARY_PATH",
        "LOGNAME",
        "MKL_NUM_THREADS",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "PATH",
        "PATHEXT",
        "PYTHONHOME",
        "PYTHONNOUSERSITE",
        "SYSTEMROOT",
        "TZ",
        "USER",
        "VIRTUAL_ENV",
        "WINDIR",
    }
)
MEMORY_FLOOR = 8 * 2**30


@dataclass(frozen=True)
class Outcome:
    """How a worker ended: the results it wrote last (None: none that can be read), and what it printed as errors."""

    results: Any
    ended: str
    errors: str

    @property
    def is_well(self) -> bool:
        return self.ended == "exit status 0" and self.results is not None

    def __str__(self) -> str:
        last = self.errors.strip().splitlines()[-1:] or ["it printed nothing"]
        return f"{self.ended}: {last[0]}"


@dataclass(frozen=True)
class Isolation:
    """A private folder for workers and what they are given; all of it goes when the block of `isolation` ends."""

    root: Path

    @property
    def hub_cache(self) -> Path:
        """The Hub cache of the workers: what is not put there is not to be had."""
        return self.root / "hub"

    def run(
        self,
        worker: str | os.PathLike[str],
        arguments: Sequence[str],
        settings: Mapping[str, Any],
        timeout: float,
        code: Iterable[str] = (),
        memory: int = MEMORY_FLOOR,
    ) -> Outcome:
        """Run the script `worker` with `arguments`, then the paths of its settings and of its results, both JSON.

        timeout  seconds, for all of it
        code     sha256 of the files whose code may run, beside the installed packages
        memory   bytes that it may allocate, where the system can hold it to that
        """
        place = Path(tempfile.mkdtemp(prefix="run-", dir=self.root))
        script, start = Path(shutil.copy(worker, place)), Path(shutil.copy(guarded_start.__file__, place))
        settings_file, results_file, guard_file = (place / f"{name}.json" for name in ("settings", "results", "guard"))
        settings_file.write_text(json.dumps(settings), encoding="utf-8")
        compared = [*code, hashlib.sha256(script.read_bytes()).hexdigest()]
        guard = {"root": str(self.root), "compared": compared, "memory": max(memory, MEMORY_FLOOR)}
        guard_file.write_text(json.dumps(guard), encoding="utf-8")
        empty = place / "empty"
        empty.mkdir()
        command = [str(start), str(guard_file), str(script), *arguments, str(settings_file), str(results_file)]
        try:
            process = subprocess.run(
                [sys.executable, *command],
                cwd=empty,
                env=self._environment(place),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
            ended, errors = f"exit status {process.returncode}", process.stderr
        except subprocess.TimeoutExpired as error:
            ended, errors = f"no end after {timeout:g} s", str(error.stderr or "")
        return Outcome(_read_results(results_file), ended, errors)

    def _environment(self, place: Path) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith("LC_")}
        packages = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        return {
            **kept,
            "HOME": str(place / "home"),
            "USERPROFILE": str(place / "home"),
            "TMPDIR": str(self.root),
            "HF_HOME": str(place / "home" / "huggingface"),
            "HF_HUB_CACHE": str(self.hub_cache),
            "HF_MODULES_CACHE": str(place / "modules"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            # Packages that were installed for the user alone are looked for in the home folder, which is another now.
            "PYTHONUSERBASE": site.getuserbase(),
            "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in packages),
            "TOKENIZERS_PARALLELISM": "false",
        }


@contextmanager
def isolation() -> Iterator[Isolation]:
    """Make the private folder; nobody else can read it or write to it."""
    with tempfile.TemporaryDirectory(prefix="vispruner-") as name:
        yield Isolation(Path(name).resolve())


def _read_results(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it ended before, or while, it wrote them
        return None
