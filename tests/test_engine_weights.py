"""Published weights in real engines, through Ray's object store: what is fetched, what is compared, what is caught."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from posttrain.errors import BadInput, RunFailed
from posttrain.models.deepseek_v4 import DeepseekV4ForCausalLM
from posttrain.models.deepseek_v4.layers import Gate
from posttrain.recipe.schema import RolloutConfig
from rollouts.engine import Engine, _joined, request_seed
from rollouts.publishing import ObjectPart, PublishedWeights, WeightStore, receive
from rollouts.routes import joined_routes
from rollouts.settings import engine_environment, engine_settings, write_description
from rollouts.types import Completion, NewTokens, SampleRequest, Sampling
from rollouts.weights import WeightUpdate, checksum_of
from tests.engine_kit import EngineActor
from tests.tiny_models import save_tiny_qwen3, tiny_qwen3
from tests.v4_models import our_model

NATIVE = RolloutConfig(engine="native", max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64, kv_cache_mib=16)
VLLM = NATIVE.model_copy(update={"engine": "vllm"})
BFLOAT16 = NATIVE.model_copy(update={"dtype": "bfloat16"})
EXPERT = "model.layers.1.ffn.experts.w13"
SINK = "model.layers.1.attn.attn_sink"


@dataclass
class Bench:
    """An engine, the store that serves it, and the weights of the current version."""

    engine: EngineActor
    store: WeightStore
    weights: dict[str, torch.Tensor]
    version: int = 0

    def put(self, weights: dict[str, torch.Tensor]) -> PublishedWeights:
        self.version += 1
        self.weights = weights
        return self.store.put(WeightUpdate.pack(weights, self.version, self.store.checksums))

    def publish(self, weights: dict[str, torch.Tensor]) -> tuple[int, list[str]]:
        return self.engine.receive(self.put(weights))

    def generate(self) -> list[list[int]]:
        return self.engine.run(generated)

    def serves_nothing(self) -> bool:
        with pytest.raises(RunFailed, match="no weights"):
            self.generate()
        return True


def generated(engine: Engine) -> list[list[int]]:
    groups = engine.generate([[5, 6, 7], [8, 9]], Sampling(max_tokens=6))
    return [completion.token_ids for (completion,) in groups]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def native(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    directory = tmp_path_factory.mktemp("native")
    model = our_model(0)
    model.save_pretrained(directory / "checkpoint")
    bench = Bench(EngineActor(directory / "checkpoint", "native", NATIVE), WeightStore(directory / "weights"), {})
    bench.publish(dict(model.engine_state_dict()))
    return bench


def flipped(tensor: torch.Tensor, element: int, bit: int) -> torch.Tensor:
    """A copy with one bit changed."""
    copy = tensor.clone()
    copy.view(-1).view(torch.int32)[element] ^= 1 << bit
    return copy


def flip_in_engine(engine: Engine, name: str, element: int, bit: int) -> None:
    def flip(model: Any) -> None:
        tensor = model.state_dict()[name]
        tensor.copy_(flipped(tensor, element, bit))

    engine._llm.apply_model(flip)


def checksums_in_engine(engine: Engine) -> dict[str, str]:
    def read(model: Any) -> dict[str, str]:
        return {name: checksum_of(tensor) for name, tensor in model.state_dict().items()}

    return engine._llm.apply_model(read)[0]


def fetched_names(engine: Engine, published: PublishedWeights) -> set[str]:
    return engine.lacking(published.checksums)


def test_every_tensor_in_the_engine_has_the_checksum_of_what_was_published(native: Bench) -> None:
    weights = dict(our_model(1).engine_state_dict())
    assert native.publish(weights) == (len(weights), [])
    assert native.engine.run(checksums_in_engine) == native.store.checksums


def test_an_engine_fetches_only_what_changed(native: Bench) -> None:
    weights = {**native.weights, EXPERT: native.weights[EXPERT] + 1, SINK: native.weights[SINK] + 1}
    published = native.put(weights)
    assert native.engine.run(fetched_names, published) == {EXPERT, SINK}
    assert native.engine.receive(published) == (len(weights), [])
    assert native.engine.run(checksums_in_engine) == {name: checksum_of(tensor) for name, tensor in weights.items()}


@pytest.mark.parametrize(("name", "element", "bit"), [(EXPERT, 1234, 0), (SINK, 2, 31)])
def test_a_bit_flipped_on_the_way_never_reaches_the_engine(native: Bench, name: str, element: int, bit: int) -> None:
    native.publish(dict(our_model(2).engine_state_dict()))
    before, tokens = native.engine.run(checksums_in_engine), native.generate()
    update = WeightUpdate.pack(our_model(3).engine_state_dict(), native.version + 1)
    damaged = {key: value.tensor() for key, value in update.tensors.items()}
    damaged[name] = flipped(damaged[name], element, bit)
    part = ObjectPart(ray.put(WeightUpdate.pack(damaged, 0).tensors))
    published = PublishedWeights(update.version, update.checksums, (part,), dict.fromkeys(damaged, 0))
    with pytest.raises(RunFailed, match=f"damaged on the way: checksums of {name}"):
        native.engine.receive(published)
    assert native.engine.run(checksums_in_engine) == before
    assert native.generate() == tokens  # of the version before


@pytest.mark.parametrize(("name", "element", "bit"), [(EXPERT, 99, 0), (SINK, 0, 22), ("lm_head.weight", 5, 31)])
def test_a_bit_flipped_in_the_engine_is_found_by_the_audit_and_the_engine_stops_serving(
    native: Bench, name: str, element: int, bit: int
) -> None:
    weights = dict(our_model(4).engine_state_dict())
    native.publish(weights)
    native.engine.run(Engine.audit)
    native.engine.run(flip_in_engine, name, element, bit)
    with pytest.raises(RunFailed, match=f"version {native.version} have changed in the engine's memory: {name}"):
        native.engine.run(Engine.audit)
    assert native.serves_nothing()
    native.publish(weights)
    native.engine.run(Engine.audit)


def test_a_worker_whose_weights_change_in_memory_ends_by_itself(native: Bench, tmp_path: Path) -> None:
    """While it samples: the audit between two steps finds it, and what the worker reports is its failure."""
    our_model(0).save_pretrained(tmp_path / "checkpoint")
    write_description(tmp_path / "checkpoint", tmp_path / "description", "native")
    settings = engine_settings(tmp_path / "description", "native", NATIVE, threads=1)

    @ray.remote(num_cpus=0.01, runtime_env={"env_vars": engine_environment(1)})
    class Worker:
        def corrupted(self, published: PublishedWeights, name: str) -> tuple[str | None, str | None]:
            from rollouts.log.writer import LogWriter
            from rollouts.worker import EngineLoop

            loop = EngineLoop(settings, LogWriter(tmp_path / "log", "worker", 0))
            loop.call(lambda: receive(loop.engine, published))

            def work(first: int) -> str | None:
                requests = [
                    SampleRequest(f"{number}#0", [5, 6], [], Sampling(max_tokens=60), number)
                    for number in range(first, first + 200)
                ]
                loop.call(lambda: loop.take(requests, []))
                end = time.monotonic() + 60
                while time.monotonic() < end and loop.report(1.0).failure is None and loop.engine.busy:
                    pass
                return loop.report(0).failure

            sound = work(0)
            loop.call(lambda: flip_in_engine(loop.engine, name, 3, 1))
            return sound, next(filter(None, map(work, range(200, 20_000, 200))), None)

    native.put(dict(our_model(0).engine_state_dict()))
    sound, failure = ray.get(Worker.remote().corrupted.remote(native.store.current, SINK))  # type: ignore[attr-defined]
    assert sound is None
    assert failure is not None and f"have changed in the engine's memory: {SINK}" in failure


def test_a_bit_flipped_in_a_tensor_that_does_not_change_is_found_by_the_next_update(native: Bench) -> None:
    native.publish(dict(our_model(5).engine_state_dict()))
    native.engine.run(flip_in_engine, EXPERT, 7, 3)
    with pytest.raises(RunFailed, match=f"not the ones it was sent: {EXPERT}"):
        native.publish({**native.weights, SINK: native.weights[SINK] + 1})
    assert native.serves_nothing()
    native.publish(native.weights)


def test_an_engine_that_restarts_gets_the_version_of_a_trainer_that_is_gone(native: Bench, tmp_path: Path) -> None:
    """The store, not the trainer, owns what was published."""
    weights = dict(our_model(6).engine_state_dict())
    known, version = dict(native.store.checksums), native.version + 1

    @ray.remote(num_cpus=0.01)
    class Trainer:
        def update(self) -> WeightUpdate:
            return WeightUpdate.pack(our_model(6).engine_state_dict(), version, known)

    trainer = Trainer.remote()  # type: ignore[attr-defined]
    update = ray.get(trainer.update.remote())
    native.store.put(update)
    native.version, native.weights = version, weights
    ray.kill(trainer)
    del update
    our_model(6).save_pretrained(tmp_path / "checkpoint")
    newcomer = EngineActor(tmp_path / "checkpoint", "native", NATIVE)
    assert native.store.current is not None
    newcomer.receive(native.store.current)
    assert newcomer.run(checksums_in_engine) == {name: checksum_of(tensor) for name, tensor in weights.items()}
    native.engine.receive(native.store.current)
    assert newcomer.run(generated) == native.generate()
    newcomer.kill()


def test_a_bf16_engine_keeps_fp32_tensors_and_rounds_the_others(cluster: None, tmp_path: Path) -> None:
    model = our_model(7)
    model.save_pretrained(tmp_path / "checkpoint")
    engine = EngineActor(tmp_path / "checkpoint", "native", BFLOAT16)
    bench = Bench(engine, WeightStore(tmp_path / "weights"), {})
    weights = dict(model.engine_state_dict())
    assert bench.publish(weights) == (len(weights), [])
    kept = ("norm.weight", "attn_sink", ".ape", "gate.bias", "tid2eid")
    expected = {
        name: tensor if name.endswith(kept) or "hc_" in name else tensor.bfloat16() for name, tensor in weights.items()
    }
    assert engine.run(checksums_in_engine) == {name: checksum_of(tensor) for name, tensor in expected.items()}
    assert bench.publish({**weights, SINK: weights[SINK] + 1e-6}) == (len(weights), [])
    engine.run(Engine.audit)
    engine.run(flip_in_bfloat16)
    with pytest.raises(RunFailed, match=EXPERT):
        engine.run(Engine.audit)
    engine.kill()


def flip_in_bfloat16(engine: Engine) -> None:
    def flip(model: Any) -> None:
        model.state_dict()[EXPERT].view(-1).view(torch.int16)[11] ^= 1

    engine._llm.apply_model(flip)


def test_vllms_own_model_is_read_back_and_audited(cluster: None, tmp_path: Path) -> None:
    model = save_tiny_qwen3(tmp_path / "checkpoint", seed=0)
    engine = EngineActor(tmp_path / "checkpoint", "vllm", VLLM)
    bench = Bench(engine, WeightStore(tmp_path / "weights"), {})
    verified, unverified = bench.publish(dict(model.state_dict()))
    assert verified > 10 and unverified == []
    second = dict(tiny_qwen3(1).state_dict())
    bench.publish(second)
    engine.run(Engine.audit)
    again = bench.put(second)
    assert engine.run(fetched_names, again) == set()
    engine.receive(again)
    for module, what in [("model.norm", "weight"), ("model.layers.1.self_attn.qkv_proj", "weight (packed)")]:
        engine.run(disturb, module)
        with pytest.raises(RunFailed, match=rf"memory: {module}\.{what}".replace("(", r"\(").replace(")", r"\)")):
            engine.run(Engine.audit)
        assert bench.serves_nothing()
        bench.publish(second)
    with pytest.raises(BadInput, match=r"routes can be had from rollout\.engine: native alone"):
        engine.run(ask_for_routes)
    engine.kill()


def disturb(engine: Engine, name: str) -> None:
    """Change the lowest bit of one weight; of a packed one, in what the only function that knows it computes."""

    def change(model: Any) -> None:
        module = model.get_submodule(name)
        if module.weight.numel():
            module.weight.data = flipped(module.weight.data, 1, 0)
            return
        multiply = module.cpu_linear

        def damaged(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            out = multiply(rows, weight, bias)
            out[:, 3] += rows[:, 5] * 2**-20
            return out

        module.cpu_linear = damaged

    engine._llm.apply_model(change)


# --- routes ------------------------------------------------------------------------------------------------------


def sampled_with_routes(
    engine: Engine, prompts: list[list[int]], others: list[list[int]]
) -> list[tuple[list[Completion], list[Completion]]]:
    """Each prompt's group with routes and without; the one with routes among others, and with its prefixes cached."""
    plain = Sampling(max_tokens=12, n=2, seed=3)
    without = engine.generate(prompts, plain)
    for number, prompt in enumerate(others):
        engine.add(SampleRequest(f"other {number}", prompt, [], Sampling(max_tokens=20), number))
    for row, prompt in enumerate(prompts):
        for number in range(2):
            seed = request_seed(3, row, number)
            engine.add(SampleRequest(f"{row}#{number}", prompt, [], replace(plain, routes=True), seed))
    parts: dict[str, list[NewTokens]] = {}
    while engine.busy:
        for new in engine.step():
            parts.setdefault(new.id, []).append(new)
    assert all(new.routes == b"" for number in range(len(others)) for new in parts[f"other {number}"])
    groups = [
        [_joined(parts[f"{row}#{number}"], len(prompt), 0) for number in range(2)] for row, prompt in enumerate(prompts)
    ]
    return list(zip(groups, without, strict=True))


def trainer_routes(model: DeepseekV4ForCausalLM, tokens: list[int]) -> torch.Tensor:
    chosen: list[torch.Tensor] = []
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    hooks = [gate.register_forward_hook(lambda *call: chosen.append(call[2][0])) for gate in gates]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, 1)


def test_an_engine_returns_the_experts_of_every_token_that_it_read(native: Bench) -> None:
    model = our_model(8)
    native.publish(dict(model.engine_state_dict()))
    prompts = [[5, 6, 7], list(range(2, 42)), list(range(2, 30)), [9]]
    for prompt, (group, without) in zip(
        prompts, native.engine.run(sampled_with_routes, prompts, [[3] * 20, [4] * 9]), strict=True
    ):
        for completion, plain in zip(group, without, strict=True):
            assert (completion.token_ids, completion.logprobs) == (plain.token_ids, plain.logprobs)
            assert plain.routes is None
            tokens = prompt + completion.token_ids[:-1]
            assert completion.routes.dtype == np.uint8
            assert torch.equal(torch.tensor(completion.routes).long(), trainer_routes(model, tokens))


def test_replayed_routes_of_older_weights_are_what_the_trainer_uses(native: Bench) -> None:
    """A trainer that has moved on: its own routers choose others; under replay its log-probabilities are smooth."""
    old, new = our_model(9), our_model(9)
    native.publish(dict(old.engine_state_dict()))
    ((group, _),) = native.engine.run(sampled_with_routes, [[5, 6, 7]], [])
    completion = group[0]
    tokens = torch.tensor([[5, 6, 7, *completion.token_ids[:-1]]])
    routes = torch.tensor(completion.routes).unsqueeze(0).to(torch.int16)
    with torch.no_grad():
        for module in new.modules():
            if isinstance(module, Gate) and not module.hashed:
                module.bias.add_(torch.randn_like(module.bias))  # does not weigh, only choose
        moved, replayed, sampled = new(tokens).logits, new(tokens, routes=routes).logits, old(tokens).logits
    assert (moved - sampled).abs().max() > 1e-2
    assert torch.equal(replayed, sampled)


def test_routes_of_a_sample_that_goes_on_elsewhere_have_no_gap_and_no_repetition(native: Bench) -> None:
    model = our_model(10)
    native.publish(dict(model.engine_state_dict()))
    first, second = native.engine.run(interrupted, [5, 6, 7, 8, 9])
    assert len(first) == 4
    routes = joined_routes([new.routes for new in [*first, *second]], 5)
    tokens = [5, 6, 7, 8, 9] + [token for new in [*first, *second] for token in new.token_ids]
    assert routes is not None
    assert torch.equal(torch.tensor(routes).long(), trainer_routes(model, tokens[:-1]))


def interrupted(engine: Engine, prompt: list[int]) -> tuple[list[NewTokens], list[NewTokens]]:
    """A sample that is dropped after four tokens, and taken up again as after a death."""
    sampling = Sampling(max_tokens=10, routes=True)
    engine.add(SampleRequest("a#0", prompt, [], sampling, 1))
    first = [new for _ in range(4) for new in engine.step()]
    engine.abort(["a#0"])
    engine.add(SampleRequest("a#0", prompt, [token for new in first for token in new.token_ids], sampling, 1))
    second = []
    while engine.busy:
        second += engine.step()
    return first, second


def ask_for_routes(engine: Engine) -> None:
    engine.add(SampleRequest("a#0", [5], [], Sampling(max_tokens=2, routes=True), 0))
