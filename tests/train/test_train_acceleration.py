"""How a network is run faster: what is chosen, and that compiled networks compute what the others do."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soteacher.errors import InputError
from soteacher.models.taps import Tapped, resolve_taps
from soteacher.train import acceleration
from soteacher.train.acceleration import COMPILED_CODE, Acceleration, Compiled, choose_acceleration, has_compiler
from soteacher.train.config import TrainingConfig

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of PyTorch, in its own compiler


@pytest.fixture(autouse=True)
def _compiler_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv(FOLDER, str(tmp_path / "compiled"))
    yield
    torch._dynamo.reset()


PLAIN = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
GROUPED = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
WITHOUT = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def chosen(network: nn.Module, *, num_examples: int = 640, device: str = "cpu", **settings: Any) -> Acceleration:
    """Return what is chosen for ten batches an epoch."""
    config = TrainingConfig.model_validate({"epochs": 5000, "batch_size": 64} | settings)
    return choose_acceleration(config, network, num_examples=num_examples, device=device)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "has_compiler", lambda: True)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("network", "settings", "channels_last", "compiled"),
    [
        (PLAIN, {}, True, True),
        (GROUPED, {}, False, False),
        (WITHOUT, {}, False, False),
        (PLAIN, {"precision": "bf16-mixed"}, True, True),
        (PLAIN, {"epochs": 4999}, True, False),  # 49,990 steps
        (PLAIN, {"epochs": 4999, "num_examples": 641}, True, True),  # 11 steps an epoch: a smaller batch is a step
        (PLAIN, {"epochs": 10_000, "stop_after": 0.4}, True, False),  # 40,000 steps are made
        (PLAIN, {"epochs": 10_000, "stop_after": 0.5}, True, True),
        (PLAIN, {"optimizer": {"momentum_difference": 0.05}}, True, False),
        (PLAIN, {"optimizer": {"name": "adamw"}}, True, True),
        (PLAIN, {"channels_last": False, "compile": False}, False, False),
        (GROUPED, {"channels_last": True, "compile": True, "epochs": 1}, True, True),
        (WITHOUT, {"channels_last": True, "compile": True, "epochs": 1}, True, True),
        (PLAIN, {"device": "cuda"}, False, True),
        (PLAIN, {"device": "cuda", "precision": "bf16-mixed"}, True, True),
        (GROUPED, {"device": "cuda", "precision": "bf16-mixed"}, True, True),
        (WITHOUT, {"device": "cuda", "precision": "bf16-mixed"}, False, True),
        (PLAIN, {"device": "cuda", "epochs": 4999}, False, False),
        (PLAIN, {"device": "cuda", "channels_last": True, "compile": False}, True, False),
    ],
)  # fmt: skip
def test_choice_follows_the_stated_rules(
    network: nn.Module, settings: dict[str, Any], *, channels_last: bool, compiled: bool
) -> None:
    graphs = compiled and settings.get("device") == "cuda"
    assert chosen(network, **settings) == Acceleration(channels_last=channels_last, compiled=compiled, graphs=graphs)


def test_without_a_compiler_only_who_insists_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "has_compiler", lambda: False)
    assert not chosen(PLAIN).compiled
    assert chosen(PLAIN, compile=True).compiled


def test_short_trainings_do_not_look_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "has_compiler", lambda: pytest.fail("looked for"))
    assert not chosen(PLAIN, epochs=1).compiled


def test_looking_for_a_compiler_keeps_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    has_compiler()
    assert os.environ[FOLDER].endswith("/compiled")
    assert not os.environ[FOLDER].endswith("/soteacher/compiled")  # the user's own word
    monkeypatch.delenv(FOLDER)
    has_compiler()
    assert os.environ[FOLDER] == str(Path(COMPILED_CODE).expanduser())

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert not has_compiler()


class Counted:
    """Stands for compiled code."""

    def __init__(self, network: nn.Module, options: dict[str, Any]) -> None:
        self.network, self.options, self.sizes = network, options, list[int]()

    def __call__(self, images: Tensor) -> Any:
        self.sizes.append(len(images))
        return self.network(images)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Counted]:
    """What torch.compile has made, in its order."""
    made: list[Counted] = []

    def stand_in(network: nn.Module, **options: Any) -> Counted:
        made.append(Counted(network, options))
        return made[-1]

    monkeypatch.setattr(torch, "compile", stand_in)
    return made


@pytest.mark.parametrize("frozen", [False, True])
def test_whole_batches_in_the_networks_own_mode_are_compiled(counted: list[Counted], *, frozen: bool) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    compiled = Compiled(network, batch_size=4, frozen=frozen, required=True).train(not frozen)
    with torch.set_grad_enabled(not frozen):
        for size in (4, 4, 3, 12, 5, 1, 8):
            images = torch.rand(size, 3, 2, 2)
            assert torch.equal(compiled(images), network(images))
        assert counted[0].sizes == [4, 4, 12, 8]
        compiled.train(frozen)
        compiled(torch.rand(4, 3, 2, 2))
        assert len(counted[0].sizes) == 4
        compiled.train(not frozen)
        compiled(torch.rand(4, 3, 2, 2))
        assert len(counted[0].sizes) == 5
    with torch.set_grad_enabled(frozen):  # training images are looked at without gradients, too
        compiled(torch.rand(4, 3, 2, 2))
    assert len(counted[0].sizes) == 5
    assert counted[0].options == {"dynamic": False, "mode": "default"}


def test_graphs_are_a_mode_of_the_compiler(counted: list[Counted]) -> None:
    Compiled(WITHOUT, batch_size=4, frozen=False, required=True, graphs=True)
    assert counted[0].options == {"dynamic": False, "mode": "reduce-overhead"}


def test_weights_are_there_once(counted: list[Counted]) -> None:
    network = copy.deepcopy(PLAIN)
    compiled = Compiled(network, batch_size=4, frozen=False, required=True)
    assert list(compiled.state_dict()) == [f"network.{name}" for name in network.state_dict()]
    assert [id(parameter) for parameter in compiled.parameters()] == [id(value) for value in network.parameters()]
    assert len(list(compiled.modules())) == 1 + len(list(network.modules()))
    assert len(counted) == 1


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Let torch.compile trace as it does, and a function make the code."""
    compile_really = torch.compile

    def put(make: Callable[..., Any]) -> None:
        monkeypatch.setattr(torch, "compile", lambda network, **_: compile_really(network, dynamic=False, backend=make))

    return put


def test_settings_of_the_compiler_hold_while_it_works(backend) -> None:
    import torch._dynamo.config as tracing
    import torch._inductor.config as generating

    seen: list[tuple[bool, bool]] = []

    def make(graph: Any, _: Any) -> Any:
        seen.append((generating.freezing, generating.fallback_random))
        return graph.forward

    backend(make)
    before = generating.freezing, generating.fallback_random, tracing.recompile_limit
    for frozen in (False, True):
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3 + frozen))
        compiled = Compiled(network, batch_size=4, frozen=frozen, required=True).train(not frozen)
        with torch.set_grad_enabled(not frozen):
            compiled(torch.rand(4, 3, 2, 2))
    assert seen == [(False, True), (True, True)]
    assert before == (generating.freezing, generating.fallback_random, tracing.recompile_limit)


@pytest.mark.parametrize("frozen", [False, True])
def test_many_networks_of_one_process_are_all_compiled(backend, *, frozen: bool) -> None:
    """PyTorch compiles eight kinds of one function and then no more; frozen networks are a kind each."""
    made, ran = list[int](), list[int]()

    def make(graph: Any, _: Any) -> Any:
        number = len(made)
        made.append(number)

        def run(*values: Any) -> Any:
            ran.append(number)
            return graph.forward(*values)

        return run

    backend(make)
    images = torch.rand(4, 3, 2, 2)
    networks = [
        Tapped(nn.Sequential(nn.Flatten(), nn.Linear(12, 2 + number * (not frozen))), {}) for number in range(20)
    ]
    compiled = [
        Compiled(network.requires_grad_(not frozen), batch_size=4, frozen=frozen, required=True).train(not frozen)
        for network in networks
    ]
    with torch.set_grad_enabled(not frozen):
        for _ in range(2):
            for called, network in zip(compiled, networks, strict=True):
                assert torch.equal(called(images)[0], network(images)[0])
    assert len(made) == 20
    assert ran == [*range(20), *range(20)]


def test_a_network_that_cannot_be_compiled_is_an_error_or_runs_anyhow(backend) -> None:
    attempts: list[int] = []

    def fail(*_: Any) -> Any:
        attempts.append(1)
        raise RuntimeError("no such\narithmetic")

    backend(fail)
    images, network = torch.rand(4, 3, 2, 2), nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(InputError) as caught:
        Compiled(network, batch_size=4, frozen=False, required=True)(images)
    message = str(caught.value)
    assert message.startswith("the network cannot be compiled: ")
    assert "no such" in message
    assert message.endswith("; set training.compile to false")
    assert "\n" not in message
    lenient = Compiled(network, batch_size=4, frozen=False, required=False)
    with pytest.warns(UserWarning, match="the network is not compiled: .*no such"):
        assert torch.equal(lenient(images), network(images))
    assert torch.equal(lenient(images), network(images))  # without another word
    assert torch.equal(lenient(images.repeat(2, 1, 1, 1)), network(images.repeat(2, 1, 1, 1)))
    assert len(attempts) == 2


def test_errors_of_the_network_itself_stay_what_they_are(counted: list[Counted]) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Compiled(WITHOUT, batch_size=4, frozen=False, required=False)(torch.rand(4, 3, 3, 3))
    assert len(counted) == 1


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")


@needs_compiler
def test_fifty_steps_of_a_compiled_network_are_those_of_the_plain_one(tiny_network) -> None:
    """With batch normalisation, dropout and an odd batch at the end of every epoch."""
    torch.manual_seed(0)
    plain = Tapped(tiny_network(3, 1), {})
    network = copy.deepcopy(plain)
    compiled = Compiled(network, batch_size=8, frozen=False, required=True)
    found, wanted = (_fifty_steps(one) for one in (compiled, plain))
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
    for name, value in plain.state_dict().items():
        assert torch.allclose(network.state_dict()[name], value, rtol=1e-4, atol=1e-5), name
    assert int(network.get_buffer("network.norm.num_batches_tracked")) == 50


def _fifty_steps(called: nn.Module) -> Tensor:
    optimizer = torch.optim.SGD(called.parameters(), lr=0.01, momentum=0.9)
    source, losses = torch.Generator().manual_seed(5), list[Tensor]()
    for number in range(50):
        size = 3 if number % 5 == 4 else 8
        images = torch.rand(size, 1, 12, 12, generator=source)
        labels = torch.randint(0, 3, (size,), generator=source)
        torch.manual_seed(number)
        loss = nn.functional.cross_entropy(called(images)[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@needs_compiler
def test_frozen_networks_answer_as_the_plain_ones_do(tiny_network) -> None:
    """Two of one kind: the constants of the first must not be found in the code of the second."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        bare = tiny_network(3, 1)
        with torch.no_grad():
            bare.norm.running_mean.normal_()
            bare.norm.running_var.uniform_(0.5, 2)
        plain = Tapped(bare, resolve_taps(bare, ["pooled"])).eval().requires_grad_(False)
        before = {name: value.clone() for name, value in plain.state_dict().items()}
        compiled = Compiled(plain, batch_size=8, frozen=True, required=True).eval()
        images = torch.rand(8, 1, 12, 12)
        for _ in range(2):  # compiled, and taken as it is
            with torch.no_grad():
                (logits, features), (wanted, there) = compiled(images), plain(images)
            assert (logits - wanted).abs().max() < 1e-5
            assert features.keys() == there.keys() == {"pooled"}
            assert (features["pooled"] - there["pooled"]).abs().max() < 1e-5
        assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
