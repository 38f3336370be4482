"""Reading recipes: YAML, overrides, paths, and the resolved recipe."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from posttrain.errors import BadInput
from posttrain.recipe import Recipe, load_recipe, read_recipe, resolved_yaml
from posttrain.recipe.document import Document, RecipeDumper, RecipeLoader, dotted, read_document, split_key
from posttrain.recipe.domains import DatasetSource, JsonlSource, ReasoningGymSource
from posttrain.recipe.problems import problems_of
from tests.recipe_kit import ROOT, SMALL, recipe_with, write_recipe


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "small.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem.replace("_", "-")
    assert recipe.stages.student is None or len(recipe.domains) >= 2, "a student has several teachers"


def test_values_and_defaults_are_read(small: Path) -> None:
    recipe = load_recipe(small)
    assert recipe.seed == 3
    assert isinstance(recipe.domains["sums"].source, ReasoningGymSource)
    assert recipe.domains["words"].train == 20_000
    assert [stage.kind for stage in recipe.expert_stages("sums")] == ["sft", "grpo"]
    assert recipe.stages.student is not None and recipe.stages.student.divergence == "reverse_kl"


def test_stage_names_follow_domains_overrides_and_the_student() -> None:
    changes: dict[str, Any] = {"stages.experts.overrides": {"words": [{"kind": "grpo", "steps": 1}]}}
    names = Recipe.model_validate(recipe_with(changes)).stage_names()
    assert names == ["base", "expert/sums/sft", "expert/sums/grpo", "expert/words/grpo", "student"]
    assert "student" not in Recipe.model_validate(recipe_with({"stages.student": None})).stage_names()


def test_the_resolved_recipe_reads_back_as_the_same_recipe(small: Path, tmp_path: Path) -> None:
    overrides = ["stages.base.optimizer.lr=1e-5", "domains.sums.system='no'", "domains.words.system='1e-3'"]
    recipe = load_recipe(small, overrides)
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe))
    assert read_recipe(tmp_path / "resolved.yaml") == recipe
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_written_as_yaml_reads_back_as_the_same_values(value: Any) -> None:
    text = yaml.dump(value, Dumper=RecipeDumper, allow_unicode=True, sort_keys=False)
    read = yaml.load(text, RecipeLoader)
    assert json.dumps(read) == json.dumps(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1.5E+2", 150.0), (".5", 0.5), ("3.", 3.0), ("-.inf", -math.inf), ("20_000", 20_000),
        ("-7", -7), ("+7", 7), ("0", 0), ("010", "010"), ("1:30", "1:30"), ("no", "no"), ("on", "on"), ("yes", "yes"),
        ("True", True), ("false", False), ("~", None), ("null", None), ("2026-01-02", "2026-01-02"), ("0x1f", "0x1f"),
        ("1e", "1e"), ("e3", "e3"), ("''", ""), ("1.2.3", "1.2.3"), ("1e3", 1000.0), (".", "."),
    ],
)  # fmt: skip
def test_plain_values_mean_what_they_look_like(text: str, value: Any) -> None:
    read = yaml.load(text, RecipeLoader)
    assert read == value
    assert type(read) is type(value)


def test_anchors_and_merge_keys_work_and_know_their_lines(tmp_path: Path) -> None:
    (tmp_path / "merged.yaml").write_text(
        "name: merged\n"
        "model: {config: tiny}\n"
        "domains:\n"
        "  one: &one\n"
        "    source: {reasoning_gym: chain_sum}\n"
        "    holdout: 300\n"
        "  two:\n"
        "    <<: *one\n"
        "    holdout: 400\n"
        "stages: {experts: {per_domain: [{kind: sft}]}}\n"
    )
    document = read_document(tmp_path / "merged.yaml")
    assert load_recipe(tmp_path / "merged.yaml").domains["two"].holdout == 400
    assert document.place(("domains", "two", "holdout")).endswith(":9")
    assert document.place(("domains", "two", "source", "reasoning_gym")).endswith(":5")
    assert document.place(("domains", "two", "absent", "key")).endswith(":7")


@pytest.mark.parametrize("key", [("a",), ("a", "b"), ("stages", "per_domain", 0, "steps"), ("a", 1, 2, "b")])
def test_dotted_keys_are_read_as_they_are_written(key: tuple[str | int, ...]) -> None:
    assert split_key(dotted(key)) == key


def test_overrides_change_one_key_each_and_keep_its_neighbours(small: Path) -> None:
    recipe = load_recipe(
        small,
        [
            "stages.base.steps=7",
            "stages.experts.per_domain.1.steps=8",
            "stages.experts.per_domain[0].optimizer.lr=5e-4",
            "domains.sums.source.params.min_terms=2",
            "rollout.max_model_len=64",
            "stages.student=null",
            "domains.words.reward=[exact, {length: {target: 4, limit: 9}}]",
            "stages.base.steps=9",
        ],
    )
    assert recipe.stages.base is not None and recipe.stages.base.steps == 9
    assert recipe.stages.base.optimizer.lr == 1e-3
    assert [stage.steps for stage in recipe.expert_stages("sums")] == [10, 8]
    assert recipe.expert_stages("sums")[0].optimizer.lr == 5e-4
    source = recipe.domains["sums"].source
    assert isinstance(source, ReasoningGymSource) and source.params == {"max_terms": 2, "min_terms": 2}
    assert recipe.stages.student is None
    assert recipe.domains["words"].reward[1] == {"length": {"target": 4, "limit": 9}}


def test_the_seed_argument_wins_over_recipe_and_overrides(small: Path) -> None:
    assert load_recipe(small, ["seed=5"], seed=6).seed == 6


def test_paths_start_at_the_recipe_and_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    for name in ("recipes/data.jsonl", "here.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "answer": "b"}\n')
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    path = write_recipe(
        tmp_path / "recipes" / "small.yaml",
        {
            "model": {"checkpoint": "../checkpoint"},
            "domains.sums.source": {"jsonl": "data.jsonl"},
            "domains.words.source": {"dataset": "../checkpoint"},
        },
    )
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(Path("recipes") / path.name)
    assert recipe.model.checkpoint == str(checkpoint.resolve())
    source = recipe.domains["sums"].source
    assert isinstance(source, JsonlSource) and source.jsonl == str((tmp_path / "recipes" / "data.jsonl").resolve())
    words = recipe.domains["words"].source
    assert isinstance(words, DatasetSource) and words.dataset == str(checkpoint.resolve())
    typed = load_recipe(path, ["domains.sums.source.jsonl=here.jsonl"]).domains["sums"].source
    assert isinstance(typed, JsonlSource) and typed.jsonl == str((tmp_path / "here.jsonl").resolve())


def test_a_hub_model_in_the_cache_is_accepted_and_its_name_kept(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = load_recipe(small, ["model={checkpoint: org/name}"])
    assert recipe.model.checkpoint == "org/name"


def test_a_hub_model_that_cannot_be_had_is_refused_without_waiting(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=r"model\.checkpoint: 'org/name' is no directory here, and the hub does not"):
        load_recipe(small, ["model={checkpoint: org/name}"])


def test_a_run_directorys_recipe_is_read_though_what_it_names_is_gone(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", {"model": {"checkpoint": "/gone/away"}})
    assert read_recipe(path).model.checkpoint == "/gone/away"


def test_reading_and_checking_a_recipe_imports_no_torch(small: Path) -> None:
    code = (
        "import sys; from posttrain.cli import app; from posttrain.recipe import load_recipe, resolved_yaml\n"
        "resolved_yaml(load_recipe(sys.argv[1]))\n"
        "print(sorted({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(small)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_file_whatsoever_ends_in_anything_but_a_message(content: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        with pytest.raises(BadInput) as caught:
            load_recipe(file.name)
        assert str(caught.value).startswith(file.name)


def _paths(value: Any, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    below = [path for key, inner in items for path in _paths(inner, (*prefix, key))]
    return [*([prefix] if prefix else []), *below]


@example(("stages", "experts", "per_domain"), [])
@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(_paths(SMALL)),
    st.sampled_from([None, True, -1, 0, 2.5, "", "text", [], [1], {}, {"x": 1}, [{}], {"kind": "sft"}, 10**30]),
)
def test_any_value_at_any_key_is_accepted_or_refused_by_a_key_that_is_near(
    path: tuple[str | int, ...], value: Any
) -> None:
    from pydantic import ValidationError

    data = recipe_with({dotted(path): value})
    try:
        Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        document = Document(Path("small.yaml"), data)
        problems = problems_of(error, data)
        assert problems
        for problem in problems:
            assert "Input should" not in problem.message, problem  # pydantic's words, where ours are missing
            assert "<" not in dotted(problem.key)
            assert document.place(problem.key) == "small.yaml"
        related = [p.key[: len(path)] == path or path[: len(p.key)] == p.key for p in problems]
        assert any(related) or "domains" in path  # sizes of domains are compared with other keys
