"""Programs that others wrote, asking ``headwater serve``: lm-eval and LiteLLM.

``make clients``, or ``python benchmarks/clients/run.py``. They live in an environment of their own (``.venv-clients``
beside this file), which sees this one's packages, so that torch is not installed twice. A tiny random Llama is served;
lm-eval's answers are compared with those of its own ``hf`` backend on the same files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATIENCE = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, help="an interpreter that has them already")
    options = parser.parse_args()
    python = options.python or environment()
    quiet = os.environ | {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    failed = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "toy"
        make_model(folder)
        port = 18_000 + os.getpid() % 1000
        server = subprocess.Popen(
            [sys.executable, "-m", "headwater", "serve", "--model", str(folder), "--static", "--port", str(port)]
        )
        try:
            wait(f"http://127.0.0.1:{port}/readyz", server)
            for name in ("with_litellm.py", "with_lm_eval.py"):
                command = [str(python), str(HERE / name), f"http://127.0.0.1:{port}", str(folder)]
                if subprocess.run(command, env=quiet, cwd=place, check=False).returncode:
                    failed.append(name)
        finally:
            server.terminate()
            server.wait(PATIENCE)
    print(f"failed: {', '.join(failed)}" if failed else "lm-eval and LiteLLM: all passed")
    return len(failed)


def environment() -> Path:
    """Their environment's interpreter; made if it is not there."""
    home = HERE / ".venv-clients"
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        ours = sysconfig.get_path("purelib")
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        (home / "lib" / version / "site-packages" / "ours.pth").write_text(f"{ours}\n", encoding="utf-8")
        subprocess.run([str(python), "-m", "pip", "install", "-r", str(HERE / "requirements.txt")], check=True)
    return python


def make_model(folder: Path) -> None:
    """A Llama of random values, with a tokenizer of bytes and a chat template."""
    import torch

    sys.path.insert(0, str(ROOT))
    from tests.gateway.engine_models import folder as model

    made = model(positions=4096)
    with torch.no_grad():
        made.module.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)


def wait(url: str, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and server.poll() is None:
        try:
            with urlopen(url, timeout=1):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise SystemExit("the server did not become ready")


if __name__ == "__main__":
    sys.exit(main())
