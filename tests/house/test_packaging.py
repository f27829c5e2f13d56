"""A source distribution and a wheel of it hold all that is used after `pip install`."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("vllm_eagle", "patches")


def run(*command: str | Path, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.mark.exhaustive
def test_demo_runs_from_a_wheel_of_the_source_distribution(tmp_path: Path) -> None:
    """Beside vLLM, in an environment that knows nothing of this checkout."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"))
    files = {path.relative_to(source).as_posix() for name in PACKAGES for path in (source / name).rglob("*") if path.is_file()}
    sdist = tmp_path / run(
        *(sys.executable, "-c", f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"), cwd=source
    ).stdout.splitlines()[-1]  # fmt: skip
    with tarfile.open(sdist) as archive:
        assert files <= {name.partition("/")[2] for name in archive.getnames()}

    # Of the archive alone: what the checkout has beside it must not help.
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--use-pep517", "-w", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        moved = {f"vllm_eagle/{name}" if name.startswith("patches/") else name for name in files}
        assert moved <= set(archive.namelist())

    home = tmp_path / "environment"
    venv.create(home)
    python = home / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", wheel, cwd=tmp_path)
    # A folder that a .pth names is searched, but .pth files in it are not read: vLLM is there, the editable install is not.
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip())
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert run(python, "-c", "import vllm_eagle; print(vllm_eagle.__file__)", cwd=tmp_path).stdout.startswith(str(home))
    done = run(home / "bin" / "vllm-eagle", "demo", cwd=tmp_path, timeout=900)
    assert "identical: yes" in done.stdout
    assert done.stderr == ""
