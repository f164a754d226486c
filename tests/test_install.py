"""The wheel, installed beside the jax that is there and used from another folder."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

REPO = pathlib.Path(__file__).parents[1]
PLACES = {"hysparse_jax": "hysparse_jax", "pallas_kernels": "pallas_kernels",
          "configs": "hysparse_jax/configs", "experiments": "hysparse_jax/experiments"}
SNIPPET = re.search(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Built from a copy: setuptools writes beside what it builds, and takes up what it once wrote."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  for name in PLACES:
    shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
    shutil.copy(REPO / name, source)
  _run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
        "-q", "-w", str(folder), str(source)], folder)
  return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """Runs a program with the wheel's packages and the interpreter's, in a folder without either."""
  folder = tmp_path_factory.mktemp("installed")
  site = folder / "site"
  _run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target",
        str(site), str(wheel)], folder)
  (folder / "elsewhere").mkdir()
  return lambda *command: _run([str(site / "bin" / "hysparse") if part == "hysparse" else part
                                for part in command], folder / "elsewhere", site)


def _run(command, cwd, site=None):
  env = dict(os.environ, JAX_PLATFORMS="cpu")
  if site:
    inherited = [path for path in env.get("PYTHONPATH", "").split(os.pathsep)
                 if path and not (pathlib.Path(path) / "hysparse_jax").exists()]
    env["PYTHONPATH"] = os.pathsep.join([str(site), *inherited])
  done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
  return done.stdout


def test_the_wheel_holds_every_module_and_no_general_name(wheel):
  held = set(zipfile.ZipFile(wheel).namelist())
  wanted = {f"{inside}/{path.relative_to(REPO / folder).as_posix()}"
            for folder, inside in PLACES.items() for path in (REPO / folder).rglob("*.py")}
  assert len(wanted) > 150
  assert {name for name in held if name.endswith(".py")} == wanted
  assert {"hysparse_jax/py.typed", "pallas_kernels/py.typed",
          "hysparse_jax/experiments/data/selections_32k.npz"} <= held
  assert {name.split("/")[0] for name in held if ".dist-info" not in name} == {
    "hysparse_jax", "pallas_kernels"}
  assert any(name.endswith("licenses/LICENSE") for name in held)


IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
from absl import flags
import hysparse_jax
assert "jax" not in sys.modules, "importing hysparse_jax imports jax"
import pallas_kernels

count = 0
for package in (pallas_kernels, hysparse_jax):
  assert "site" in pathlib.Path(package.__file__).parts, package.__file__
  walk = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
  for module in walk:
    if module.name.endswith("__main__") or ".configs" in module.name:
      continue
    try:
      importlib.import_module(module.name)
      count += 1
      for name, its_flags in flags.FLAGS.flags_by_module_dict().items():
        # Two programs may share names of flags; those of cli and rows are every program's.
        if name.startswith("hysparse_jax.experiments") and not name.endswith((".cli", ".rows")):
          for flag in list(its_flags):
            if flag.name in flags.FLAGS:
              delattr(flags.FLAGS, flag.name)
    except ImportError as error:          # jax-triton asks for a GPU when it is imported
      assert "triton" in str(error) or "GPU" in str(error) or "CUDA" in str(error), (module, error)
names = {name: getattr(hysparse_jax, name) for name in hysparse_jax.__all__}
assert set(names) <= set(dir(hysparse_jax))
print(count)
"""


def test_every_module_imports_elsewhere(installed):
  assert int(installed(sys.executable, "-c", IMPORT_ALL)) > 100


def test_the_readme_notebook_and_the_command(installed, tmp_path):
  """README's snippet with fewer steps and less text, then the programs on the run that it made."""
  text = tmp_path / "texts"
  text.mkdir()
  for name in "abc":
    (text / f"{name}.txt").write_text(f"import os\ndef {name}(x): return x\n" * 100)
  small = SNIPPET.replace('"train.steps=100"', '"train.steps=2", "optim.warmup_steps=1", '
                                               f'"data.source={text}"')
  small = small.replace('"def main(", 100', '"def main(", 3')
  assert small.count("train.steps=2") == small.count('main(", 3') == 1
  lines = installed(sys.executable, "-c", small).splitlines()
  assert any(re.fullmatch(r"\d+\.\d+", line) for line in lines)              # bits per byte
  assert sum(bool(re.match(r"[0-3] \[.*\] \S+ \S+$", line)) for line in lines) >= 2
  assert len(SNIPPET.splitlines()) <= 20

  assert "train" in installed("hysparse", "--help")
  version = installed("hysparse", "--version").split()[1]
  assert version == re.search(r'__version__ = "(.*)"',
                              (REPO / "hysparse_jax/__init__.py").read_text())[1]
  assert '"kv_bytes' in installed("hysparse", "account", "--config=hysparse_7b:long",
                                  "--tokens=32768", "--json")


def test_ranges_admit_the_tested_stacks():
  """Every dependency is a lower bound that the exact versions of requirements.txt satisfy."""
  requirements = pytest.importorskip("packaging.requirements")
  project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
  ranges = {r.name: r for r in map(requirements.Requirement, project["dependencies"])}
  pins = [requirements.Requirement(line.split("#")[0])
          for line in (REPO / "requirements.txt").read_text().splitlines()
          if line and not line.startswith("#")]
  assert {pin.name for pin in pins} == set(ranges)
  for pin in pins:
    (exact,) = pin.specifier
    assert exact.operator == "==" and exact.version in ranges[pin.name].specifier, pin
  assert {part.operator for one in ranges.values() for part in one.specifier} == {">="}
  assert {"tokenizers", "tensorboard", "tpu", "cuda", "test", "dev"} <= set(
    project["optional-dependencies"])
