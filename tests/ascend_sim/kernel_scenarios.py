"""What happens in a process on the simulated Ascend when it uses its kernels: a program with JSON results.

`python -m tests.ascend_sim.kernel_scenarios NAME ...` runs the functions of these names, one after another,
and prints an object with what each of them has returned. `test_kernels.py` says what that should have been.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from ascend_sim import kernels
from ascend_sim.controls import Simulator
from tests.ascend_sim import operator_cases

DEVICE = "npu:0"
LIMIT_S = 20.0
STRETCH_US = 30_000
LEFT: list[Any] = []  # what nobody frees before the process ends
SIZES = (1, 100, 100_000)  # elements of freed blocks; the allocator rounds to 512 bytes


def npu() -> Any:
    return torch.get_device_module("npu")


# --- values --------------------------------------------------------------------------------------


def operators() -> dict[str, str | None]:
    """For each case of the table what is wrong with it."""
    return operator_cases.problems(DEVICE)


def random_numbers() -> dict[str, Any]:
    """Whether draws are equal: with another state, after the same seed, after the state was put back."""
    torch.manual_seed(5)
    first, second = _draw(None), _draw(None)
    torch.manual_seed(5)
    again = _draw(None)
    own = torch.Generator(device=DEVICE).manual_seed(7)
    state = own.get_state()
    mine = _draw(own)
    own.set_state(state)
    uniform = torch.rand(100_000, device=DEVICE)
    dropped = functional.dropout(torch.ones(10_000, device=DEVICE), p=0.25)
    return {
        "next draw": _equal(first, second),
        "same seed": _equal(first, again),
        "same state": _equal(mine, _draw(own)),
        "other generator": _equal(first, mine),
        "mean of uniform": uniform.mean().item(),
        "dropped": (dropped == 0).float().mean().item(),
        "rest of dropout": dropped.unique().tolist(),
    }


def gradients() -> list[list[float]]:
    """Of a small network, on the CPU and on the device."""
    found = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(1)
        layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2)).to(device)
        data = torch.arange(12.0).reshape(3, 4).to(device)
        logits = layers(data)
        loss = (logits.softmax(-1) @ logits.t()).sum()
        gradients_of_layers = torch.autograd.grad(loss, list(layers.parameters()))
        found.append([value for gradient in gradients_of_layers for value in gradient.flatten().tolist()])
    return found


def host_numbers_are_read_at_once() -> float:
    """A number on the host that changes after the call, before the device gets there."""
    number, tens = torch.tensor(2.0), torch.full((3,), 10.0, device=DEVICE)
    with Simulator() as simulator, simulator.hold("aten::mul.Tensor") as gate:
        product = tens * number
        number.fill_(5)
        gate.release()
    return _first(product)


def another_device() -> dict[str, Any]:
    """Operators on tensors of a device that is not the current one."""
    left, right = torch.ones(2, device=DEVICE), torch.ones(2, device="npu:1")
    doubled = right + right
    return {
        "device": str(doubled.device),
        "sum": doubled.tolist(),
        "current device": npu().current_device(),
        "both": _error(lambda: left + right),
    }


def errors() -> dict[str, str]:
    """What the caller is told at once."""
    three, four = torch.ones(3, device=DEVICE), torch.ones(4, device=DEVICE)
    return {
        "sizes": _error(lambda: three + four),
        "sizes in place": _error(lambda: three.add_(four)),
        "sizes of a mask": _error(lambda: three.masked_select(four > 0)),
        "host tensor": _error(lambda: three + torch.ones(3)),
        "host generator": _error(lambda: torch.rand(3, device=DEVICE, generator=torch.Generator())),
    }


def index_out_of_range() -> None:
    """Ends the process."""
    torch.ones(3, device=DEVICE)[torch.tensor([5], device=DEVICE)].cpu()


def torch_npus_own_kernels() -> dict[str, bool]:
    """What torch_npu does without ours: which of its results are equal to the CPU's."""
    import torch_npu

    cast = torch_npu.npu_dtype_cast
    cases: dict[str, Callable[[str], torch.Tensor]] = {
        "ones": lambda device: torch.ones(2, 3, dtype=torch.bfloat16, device=device),
        "zero a column": lambda device: torch.ones(3, 4).to(device)[:, 1:3].zero_(),
        "fill": lambda device: torch.empty(5, device=device).fill_(2.5),
        "fill a column": lambda device: _with_filled_column(device),
        "fill with a large number": lambda device: (
            torch.empty(2, dtype=torch.int64).to(device).fill_(2**60 + 1)
        ),
        "fill with a tensor": lambda device: torch.empty(5, device=device).fill_(
            torch.tensor(3.5).to(device)
        ),
        "pad": lambda device: functional.pad(torch.arange(6).reshape(2, 3).to(device), (1, 2, 0, 1), value=7),
        "pad with nothing": lambda device: functional.pad(torch.arange(6.0).reshape(2, 3).to(device), (2, 1)),
        "cut off": lambda device: functional.pad(
            torch.arange(12.0).reshape(3, 4).to(device), (-1, 2, 1, -2), value=7
        ),
        "cast": lambda device: _cast(torch.arange(6) * 1.3, torch.int32, device, cast),
        "cast to bfloat16": lambda device: _cast(
            torch.randn(99, generator=_seeded()), torch.bfloat16, device, cast
        ),
    }
    return {name: torch.equal(case(DEVICE).cpu(), case("cpu")) for name, case in cases.items()}


# --- order ---------------------------------------------------------------------------------------


def host_waits() -> dict[str, list[int]]:
    """How many operators were enqueued, and how many made the host wait."""
    data = torch.ones(9, device=DEVICE)
    steps: dict[str, Callable[[], Any]] = {
        "add": lambda: data + 1,
        "out": lambda: torch.mul(data, 2, out=data),
        "matmul": lambda: data.reshape(3, 3) @ data.reshape(3, 3),
        "nonzero": lambda: data.nonzero(),
        "equal": lambda: data.equal(data),
    }
    found = {}
    for name, step in steps.items():
        before = kernels.counts()
        step()
        found[name] = [after - b for after, b in zip(kernels.counts(), before, strict=True)]
    return found


def values_are_waited_for() -> dict[str, Any]:
    """What the host asks for while a kernel that makes it stands at a gate."""
    asked: dict[str, Callable[[torch.Tensor], Any]] = {
        "item": lambda made: made[0].item(),
        "tolist": lambda made: made.tolist(),
        "nonzero": lambda made: list(made.nonzero().shape),
        "equal": lambda made: made.equal(made),
    }
    return {name: _asked_at_a_gate(ask) for name, ask in asked.items()}


def kernels_keep_their_place() -> list[str]:
    """The names of tasks of one stream, in the order in which they ran."""

    def use(made: torch.Tensor) -> None:
        made.add_(1)
        kernels.occupy(5)
        made.mul_(2)

    return _tasks_of(lambda: use(torch.zeros(3, device=DEVICE)))


def occupation() -> dict[str, Any]:
    """Whether the stream was idle when `occupy` returned; seconds until it was; seconds of a core."""
    npu().synchronize()
    began, used = time.monotonic(), time.process_time()
    kernels.occupy(300)
    idle = npu().current_stream().query()
    npu().synchronize()
    return {"idle": idle, "seconds": time.monotonic() - began, "core": time.process_time() - used}


def padded() -> dict[str, Any]:
    """Two stretches of a stream that other streams and the host wait for: what was seen of them."""
    npu().synchronize()
    kernels.take_stretches()
    waits_before = kernels.host_waits()
    tensor = torch.zeros(3, device=DEVICE)
    for _ in range(2):
        kernels.begin_stretch()
        tensor.add_(1)
        kernels.end_stretch(STRETCH_US)
    idle = npu().current_stream().query()
    with npu().stream(npu().Stream()) as _:
        other = npu().current_stream()
        other.wait_stream(npu().default_stream())
        kernels.begin_stretch()
        kernels.end_stretch()
    npu().synchronize()
    waits = kernels.host_waits()
    return {
        "idle": idle,
        "value": tensor.tolist(),
        "stretches": [list(stretch) for stretch in kernels.take_stretches()],
        "left": len(kernels.take_stretches()),
        "host": [waits.waits - waits_before.waits, waits.nanoseconds - waits_before.nanoseconds],
    }


def threads() -> list[float]:
    """Sums made by several host threads at once, each on a stream of its own."""
    sums: list[float] = []

    def add_up() -> None:
        with npu().stream(npu().Stream()):
            total = torch.zeros(4, device=DEVICE)
            for number in range(200):
                total = total + number
            sums.append(total[0].item())

    workers = [threading.Thread(target=add_up) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(LIMIT_S)
    return sums


# --- memory that is freed too early --------------------------------------------------------------


def reads_of_freed_memory() -> dict[str, Any]:
    """What a kernel reads on another stream, held at a gate until the owner's stream has done all it had to.

    By what the host did with the tensor after the launch, and by the number of elements.
    """
    found: dict[str, Any] = {}
    for size in SIZES:
        found[f"dropped, {size}"] = _read_on_another_stream(size, keep=False)
        found[f"kept, {size}"] = _read_on_another_stream(size, keep=True)
        found[f"recorded, {size}"] = _read_on_another_stream(size, keep=False, record=True)
    found["dropped, on the other device"] = _read_on_another_stream(100, keep=False, device="npu:1")
    found["dropped, then allocated again"] = _read_on_another_stream(100, keep=False, reuse=True)
    return found


def reads_in_stream_order() -> dict[str, Any]:
    """What is right without waiting: the owner's stream reads, frees, allocates again and writes."""
    found: dict[str, Any] = {}
    for size in SIZES:
        first = torch.full((size,), 7.0, device=DEVICE)
        copy = first + 0
        address = first.data_ptr()
        del first
        later = [torch.full((size,), 8.0, device=DEVICE) for _ in range(64)]
        (same,) = (tensor for tensor in later if tensor.data_ptr() == address)
        found[f"{size}"] = [_only_value(copy), _only_value(same)]
    return found


def tensors_left_at_the_end() -> int:
    """Leave blocks of several streams to be freed while the process ends."""
    for stream in (npu().current_stream(), npu().Stream()):
        with npu().stream(stream):
            tensor = torch.zeros(100, device=DEVICE)
            tensor.record_stream(npu().default_stream())
            LEFT.extend([stream, tensor])
    return len(LEFT)


def poison_is_a_task() -> list[str]:
    """The tasks of a stream around the end of a tensor."""

    def use() -> None:
        torch.ones(100, device=DEVICE).neg_()
        torch.ones(100, device=DEVICE).abs_()

    return _tasks_of(use)


def _read_on_another_stream(
    size: int, *, keep: bool, record: bool = False, reuse: bool = False, device: str = DEVICE
) -> Any:
    npu().synchronize()
    data = torch.full((size,), 7.0, device=device)
    owner, reader = npu().current_stream(device), npu().Stream(device)
    reader.wait_stream(owner)
    with Simulator() as simulator, simulator.hold("aten::neg") as gate:
        with npu().stream(reader):
            read = data.neg()
        gate.wait_until_held(LIMIT_S)
        if record:
            data.record_stream(reader)
        kept = data if keep else None
        del data
        if reuse:
            torch.zeros(size, device=device)
        owner.synchronize()
        gate.release()
    reader.synchronize()
    del kept
    return _only_value(read)


# --- helpers -------------------------------------------------------------------------------------


def _tasks_of(use: Callable[[], None]) -> list[str]:
    """The tasks that run on a new stream when `use` has it as the current one."""
    stream = npu().Stream()
    npu().synchronize()
    with Simulator() as simulator:
        start = simulator.history().next
        with npu().stream(stream):
            use()
        stream.synchronize()
        return [entry.task for entry in simulator.history(start).entries if entry.event == "began"]


def _asked_at_a_gate(ask: Callable[[torch.Tensor], Any]) -> Any:
    """The answer, or what is wrong: it must not be there before the gate is released."""
    answers: list[Any] = []
    with Simulator() as simulator, simulator.hold("aten::add_.Tensor") as gate:
        made = torch.zeros(4, device=DEVICE)
        made.add_(3)
        asker = threading.Thread(target=lambda: answers.append(ask(made)))
        asker.start()
        gate.wait_until_held(LIMIT_S)
        early = list(answers)
        gate.release()
    asker.join(LIMIT_S)
    return f"{early} before the gate was released" if early else answers[0]


def _draw(generator: torch.Generator | None) -> list[torch.Tensor]:
    place: dict[str, Any] = {"device": DEVICE, "generator": generator}
    odds = torch.tensor([0.1, 0.2, 0.7], device=DEVICE)
    return [
        torch.randn(20, **place),
        torch.rand(20, **place),
        torch.randint(0, 1000, (20,), **place),
        torch.randperm(50, **place),
        torch.empty(20, device=DEVICE).exponential_(generator=generator),
        torch.empty(20, device=DEVICE).normal_(generator=generator),
        torch.bernoulli(torch.full((64,), 0.5, device=DEVICE), generator=generator),
        torch.multinomial(odds, 50, replacement=True, generator=generator),
    ]


def _equal(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(some, others, strict=True)]


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return str(error).partition("\n")[0]
    return "no error"


def _with_filled_column(device: str) -> torch.Tensor:
    data = torch.zeros(3, 4).to(device)
    data[:, 1].fill_(6)
    return data


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _cast(data: torch.Tensor, dtype: torch.dtype, device: str, cast: Any) -> torch.Tensor:
    result: torch.Tensor = data.to(dtype) if device == "cpu" else cast(data.to(device), dtype)
    return result


def _first(tensor: torch.Tensor) -> float:
    value: float = tensor.cpu()[0].item()
    return value


def _only_value(tensor: torch.Tensor) -> str:
    """As text, because JSON has no NaN."""
    values = tensor.cpu().unique()
    nan = values.isnan().all()
    return "poison" if nan else ", ".join(str(value) for value in values.tolist()[:3])


def main(names: Sequence[str]) -> None:
    if "torch_npus_own_kernels" not in names:
        kernels.install()
    json.dump({name: globals()[name]() for name in names}, sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
