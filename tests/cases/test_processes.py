"""Scripts that need processes: under `headwater run`, forked, spawned, interrupted. `make test-scripts` runs these."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.cases.support import said, script
from tests.scripts.harness import ForkServer

pytestmark = pytest.mark.scripts


@pytest.fixture(scope="module")
def forkserver() -> Iterator[ForkServer]:
    """What forks the processes; those that are about forks and exits are real ones."""
    made = ForkServer()
    yield made
    made.close()


HEAD = """
import os, sys, time
import torch, headwater
from torch import nn
rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
"""


def test_two_workers_read_what_the_step_made(forkserver: ForkServer, tmp_path: Path) -> None:
    code = f"""{HEAD}
import copy
model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)])
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.5)
wrong = 0
for step in range(10):
    model(torch.randn(4, 1024)).square().mean().backward()
    opt.step(); opt.zero_grad()
    read = [p.norm() for p in model.parameters()]; copied = copy.deepcopy(model)
    ema = torch.optim.swa_utils.AveragedModel(model); ema.update_parameters(model)
    opt.synchronize()
    wrong += any(a != p.norm() for a, p in zip(read, model.parameters()))
    wrong += any(not torch.equal(a, p) for a, p in zip(copied.parameters(), model.parameters()))
    wrong += any(not torch.equal(a, p) for a, p in zip(ema.module.parameters(), model.parameters()))
print("wrong:", wrong)
"""
    code_, lines = script(tmp_path, forkserver, code, 2, 2)
    assert (code_, said(lines, "wrong:")) == (0, ["0", "0"]), lines


def test_a_compiled_model_reads_what_the_step_made(forkserver: ForkServer, tmp_path: Path) -> None:
    code = f"""{HEAD}
model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(6)])
fast = torch.compile(model, backend="aot_eager")
fast(torch.zeros(1, 1024)); fast(torch.zeros(4, 1024))
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.5)
wrong, x = 0, torch.randn(4, 1024)
for step in range(10):
    fast(torch.randn(4, 1024)).square().mean().backward()
    opt.step(); opt.zero_grad()
    early = fast(x).detach()
    opt.synchronize()
    wrong += not torch.equal(early, fast(x))
print("wrong:", wrong)
"""
    code_, lines = script(tmp_path, forkserver, code, 2, 2)
    assert (code_, said(lines, "wrong:")) == (0, ["0", "0"]), lines


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "p.mul_(1.0)": lambda p: p.mul_(1.0),
    "p.clamp_(-0.2, 0.2)": lambda p: p.clamp_(-0.2, 0.2),
    "p.data.mul_(0.5)": lambda p: p.data.mul_(0.5),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("ranks", ["(0,)", "(0, 1)"])
def test_a_write_after_a_step_is_everybodys(forkserver: ForkServer, tmp_path: Path, write: str, ranks: str) -> None:
    code = f"""{HEAD}
import hashlib
model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.05)
for step in range(20):
    model(torch.ones(8, 16)).square().mean().backward()
    opt.step(); opt.zero_grad()
    if step == 3 and rank in {ranks}:
        with torch.no_grad():
            for p in model.parameters():
                {write}
opt.synchronize()
bits = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
print("ended:", hashlib.sha256(bits).hexdigest())
"""
    code_, lines = script(tmp_path, forkserver, code, 2, 2)
    first, second = said(lines, "ended:")
    assert code_ == 0, lines
    assert first == second
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
    other = copy.deepcopy(model)  # rank 1's, which learns of a lone write with the next step
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(20):
        for each in (model, other):
            each.zero_grad()
            each(torch.ones(8, 16)).square().mean().backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            p.grad = (p.grad + q.grad) / 2
        opt.step()
        other.load_state_dict(model.state_dict())
        if step == 3:
            with torch.no_grad():
                for p in [*model.parameters(), *(other.parameters() if "1" in ranks else ())]:
                    WRITES[write](p)
    bits = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    assert first == hashlib.sha256(bits).hexdigest()


def test_folds_start_from_their_own_models_and_nobody_steps_alone(forkserver: ForkServer, tmp_path: Path) -> None:
    """Rank 1 is late at the end of a round."""
    code = f"""{HEAD}
for fold in range(3):
    torch.manual_seed(fold)
    model = nn.Linear(16, 4)
    fresh = model.weight.clone()
    with headwater.Optimizer(model, torch.optim.SGD, lr=0.1) as opt:
        own = torch.equal(model.weight, fresh)
        for step in range(5):
            model(torch.full((8, 16), 1.0 + rank)).square().mean().backward(); opt.step(); opt.zero_grad()
        print("fold:", fold, own, opt.clock, repr(model.weight.sum().item()))
        if rank == 1: time.sleep(1.5)
"""
    code_, lines = script(tmp_path, forkserver, code, 2)
    assert code_ == 0, lines
    found = said(lines, "fold:")
    wanted = []
    for fold in range(3):
        torch.manual_seed(fold)
        model = nn.Linear(16, 4)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            opt.zero_grad()
            for rank in range(2):
                model(torch.full((8, 16), 1.0 + rank)).square().mean().backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad /= 2
            opt.step()
        wanted.append(f"{fold} True 5 {model.weight.sum().item()!r}")
    assert found == wanted * 2, lines


def test_two_optimizers_under_run(forkserver: ForkServer, tmp_path: Path) -> None:
    code = f"""{HEAD}
d, g = nn.Linear(8, 1), nn.Linear(4, 8)
opt_d = headwater.Optimizer(d, torch.optim.Adam, lr=1e-3)
opt_g = headwater.Optimizer(g, torch.optim.Adam, lr=1e-3)
for _ in range(3):
    opt_d.zero_grad(); d(g(torch.randn(16, 4)).detach()).mean().backward(); opt_d.step()
    opt_g.zero_grad(); (-g(torch.randn(16, 4)).mean()).backward(); opt_g.step()
print("sum:", repr(d.weight.sum().item()), repr(g.weight.sum().item()))
"""
    code_, lines = script(tmp_path, forkserver, code, 2)
    sums = said(lines, "sum:")
    assert code_ == 0, lines
    assert len(sums) == 2
    assert sums[0] == sums[1]


def test_learning_rates_that_part_are_told(forkserver: ForkServer, tmp_path: Path) -> None:
    code = f"""{HEAD}
model = nn.Linear(1, 1, bias=False); nn.init.zeros_(model.weight)
opt = headwater.Optimizer(model, torch.optim.SGD, lr=1.0)
for step in range(4):
    if rank == 1 and step == 1: opt.param_groups[0]["lr"] = 0.125
    model(torch.ones(1, 1)).sum().backward(); opt.step(); opt.zero_grad()
print("weight:", model.weight.item())
"""
    code_, lines = script(tmp_path, forkserver, code, 2)
    if code_ == 0:
        first, second = said(lines, "weight:")
        assert first == second == "-4.0", lines
    assert "learning rate" in lines or "lr" in lines.replace("lr here", ""), lines


def test_workers_on_the_same_samples_are_told_once_and_one_line_shares_them(
    forkserver: ForkServer, tmp_path: Path
) -> None:
    code = f"""{HEAD}
data = torch.utils.data.TensorDataset(torch.arange(16.)[:, None])
model = nn.Linear(1, 1)
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.0)
loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
for _ in range(3):
    for (x,) in loader:
        if rank == 0 or os.environ.get("SHARD"): print("sample:", *x.flatten().int().tolist())
        model(x).mean().backward(); opt.step(); opt.zero_grad()
"""
    code_, lines = script(tmp_path, forkserver, code, 2)
    assert code_ == 0, lines
    assert "headwater.shard" in lines
    shared = code.replace("shuffle=True)", "shuffle=True)\nloader = headwater.shard(loader)")
    code_, lines = script(tmp_path, forkserver, shared.replace("range(3)", "range(1)"), 2, SHARD="1")
    seen = sorted(int(word) for line in said(lines, "sample:") for word in line.split())
    assert (code_, seen) == (0, list(range(16))), lines
    assert "same samples" not in lines


def test_a_torchrun_world(forkserver: ForkServer, tmp_path: Path) -> None:
    """RANK and WORLD_SIZE with MASTER_ADDR and MASTER_PORT: nanoGPT's test, Accelerate, a process group."""
    pytest.importorskip("accelerate")
    code = f"""{HEAD}
import torch.distributed as dist
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
alike = accelerator.is_main_process == (rank == 0), dist.get_rank() == rank
print("world:", accelerator.num_processes, *alike, total.item())
"""
    code_, lines = script(tmp_path, forkserver, code, 2)
    assert (code_, said(lines, "world:")) == (0, ["2 True True 3.0"] * 2), lines


def test_hugging_faces_trainer(forkserver: ForkServer, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code = f"""{HEAD}
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_constant_schedule
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
quiet = dict(use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True)
found = []
for kind in ("plain", "ours"):
    for norm in (0, 1.0):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape))
        data = [{{"input_ids": torch.arange(16), "labels": torch.arange(16)}} for _ in range(8)]
        if kind == "plain": opt = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        else: opt = headwater.Optimizer(model, torch.optim.AdamW, lr=0.01)
        args = TrainingArguments("out", max_steps=2, max_grad_norm=norm, **quiet)
        Trainer(model, args, train_dataset=data, optimizers=(opt, get_constant_schedule(opt))).train()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
print("equal:", torch.equal(found[0], found[2]), torch.equal(found[1], found[3]))
"""
    code_, lines = script(tmp_path, forkserver, code)
    assert (code_, said(lines, "equal:")) == (0, ["True True"]), lines


@pytest.mark.parametrize("workers", [None, 1])
def test_a_forked_child_that_exits_takes_nobody_with_it(tmp_path: Path, workers: int | None) -> None:
    code = f"""{HEAD}
model = nn.Linear(4, 4)
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1)
def step(): model(torch.ones(2, 4)).sum().backward(); opt.step(); opt.zero_grad()
step()
pid = os.fork()
if pid == 0:
    torch.save(model.state_dict(), "child.pt")
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
for _ in range(3): step()
print("went on:", opt.clock, len(torch.load("child.pt")))
"""
    code_, lines = script(tmp_path, None, code, workers)
    assert (code_, said(lines, "went on:")) == (0, ["4 2"]), lines


@pytest.mark.parametrize("workers", [None, 1])
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_hogwild_is_refused(tmp_path: Path, method: str, workers: int | None) -> None:
    """The script's own processes share a model: whoever makes an optimizer of it is told, nothing is silently lost."""
    code = f"""{HEAD}
import torch.multiprocessing as mp
def train(model):
    opt = headwater.Optimizer(model, torch.optim.SGD, lr=1.0)
    model(torch.ones(8, 4)).mean().backward(); opt.step(); opt.close()
if __name__ == "__main__":
    model = nn.Linear(4, 1); model.share_memory(); before = model.weight.detach().clone()
    child = mp.get_context({method!r}).Process(target=train, args=(model,)); child.start(); child.join()
    print("ended:", child.exitcode == 0, not torch.equal(before, model.weight))
"""
    _, lines = script(tmp_path, None, code, workers)
    assert said(lines, "ended:") in (["False False"], ["True True"]), lines
    if "ended: False" in lines:
        assert "UsageError" in lines, lines


def test_a_notebook_with_interrupted_cells(forkserver: ForkServer, tmp_path: Path) -> None:
    code = """
import os, random, signal
os.environ.setdefault("HEADWATER_TIMEOUT", "60")
import torch, headwater
def stop(*_): raise KeyboardInterrupt
signal.signal(signal.SIGALRM, stop)
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(20)])
opt = headwater.Optimizer(model, torch.optim.SGD, lr=1e-3)
def cell(): model(torch.randn(8, 64)).square().mean().backward(); opt.step(); opt.zero_grad()
for n in range(1, 101):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.001, 0.02))
        while True: cell()
    except KeyboardInterrupt: pass
    except headwater.GradientModified: opt.zero_grad(); opt.skip_step()
    finally: signal.setitimer(signal.ITIMER_REAL, 0)
    before = model[0].weight.detach().clone()
    opt.zero_grad(); opt.skip_step(); cell(); opt.synchronize()
    assert not torch.equal(model[0].weight, before)
else: print("survived:", n)
"""
    code_, lines = script(tmp_path, None, code)
    assert (code_, said(lines, "survived:")) == (0, ["100"]), lines


def test_a_large_table_and_the_end_of_python(tmp_path: Path) -> None:
    """2.2 GiB: the process ends well, and nothing of its own keeps the last tensor alive."""
    code = """
import torch, headwater
model = torch.nn.Embedding(1_150_000, 1024, dtype=torch.bfloat16)
opt = headwater.Optimizer(model, torch.optim.SGD, lr=1.0)
model(torch.tensor([0])).sum().backward(); opt.step(); opt.synchronize(); opt.zero_grad()
rss = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
print("own:", int(rss.split()[1]) >> 10)
"""
    for _ in range(3):
        code_, lines = script(tmp_path, None, code, 1, 2)
        assert code_ == 0, lines


def test_rank_0_may_evaluate_alone_for_longer_than_the_timeout(forkserver: ForkServer, tmp_path: Path) -> None:
    code = f"""{HEAD}
model = nn.Linear(1, 1)
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1)
for step in range(3):
    if rank == 0 and step == 1: time.sleep(9)
    model(torch.ones(4, 1)).mean().backward(); opt.step(); opt.zero_grad()
print("weight:", repr(model.weight.item()), opt.clock)
"""
    code_, lines = script(tmp_path, forkserver, code, 2, HEADWATER_TIMEOUT="4")
    weights = said(lines, "weight:")
    assert code_ == 0, lines
    assert len(weights) == 2
    assert weights[0] == weights[1]


@pytest.mark.parametrize("variables", [{"PYTHONOPTIMIZE": "2"}, {}])
def test_a_script_without_docstrings_or_a_standard_output(tmp_path: Path, variables: dict[str, str]) -> None:
    code = f"""{HEAD}
if not os.environ.get("PYTHONOPTIMIZE"): sys.stdout.close(); sys.stdout = None
model = nn.Linear(1, 1)
opt = headwater.Optimizer(model, torch.optim.SGD, lr=0.1)
for _ in range(2): model(torch.ones(4, 1)).mean().backward(); opt.step(); opt.zero_grad()
print("stepped:", opt.clock, file=sys.stderr)
"""
    code_, lines = script(tmp_path, None, code, **variables)
    assert (code_, said(lines, "stepped:")) == (0, ["2"]), lines
