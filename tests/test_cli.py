"""The command line: start-up, the MODEL argument, refusals, and every command on a real model."""

import importlib.util
import json
import sys
from contextlib import nullcontext

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import gainstage
from gainstage.cli import main
from gainstage.cli.inputs import InputSpecification, draw_inputs, parse_input, smallest_vocabulary
from gainstage.cli.models import load, parse_settings
from gainstage.errors import InputError, UnknownNameError
from gainstage.report import progress

MODEL_FILE = """
import torch
from torch import nn

WIDTH = 24


def model(depth=3):
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())])


def with_inputs(batch=5):
    return model(), (torch.randn(batch, WIDTH),)


def with_keywords():
    return model(), (), {"input": torch.randn(2, WIDTH)}


def not_a_model():
    return "a string"


def fails():
    raise RuntimeError("no such width")


number = 3


class Branching(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() < 1e9 else -y


def branching():
    return Branching(WIDTH, WIDTH)
"""


@pytest.fixture(autouse=True)
def _same_import_path(monkeypatch):
    """Loading a file lets it import its neighbours, for good; other tests' processes would inherit that."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "small_model.py"
    path.write_text(MODEL_FILE, encoding="utf-8")
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def loaded(source, **options):
    return load(str(source), **{"training": None, "seed": 0, **options})


def skip_without(library):
    """Look, do not import: a torchvision built for CUDA has to be imported our way first."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


# MODEL


def test_a_callable_in_a_file_returns_a_model_with_its_inputs(model_file):
    result = loaded(f"{model_file}:with_inputs", settings=["batch=7"])
    assert len(result.model) == 6
    assert result.args[0].shape == (7, 24)
    assert result.kwargs == {}
    assert loaded(f"{model_file}:with_keywords").kwargs["input"].shape == (2, 24)


def test_given_inputs_replace_those_of_the_model(model_file):
    result = loaded(f"{model_file}:with_inputs", inputs=["3x24"])
    assert [tuple(value.shape) for value in result.args] == [(3, 24)]


def test_a_callable_of_an_importable_module(model_file, monkeypatch):
    monkeypatch.chdir(model_file.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert len(loaded("small_model:model", inputs=["2x24"], settings=["depth=2"]).model) == 4
    assert isinstance(loaded("torch.nn:Identity", inputs=["2x3"]).model, nn.Identity)


def test_the_seed_decides_weights_and_inputs(model_file):
    first, again, other = (loaded(f"{model_file}:model", inputs=["2x24"], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.model[0].weight, again.model[0].weight)
    assert torch.equal(first.args[0], again.args[0])
    assert not torch.equal(first.args[0], other.args[0])
    assert not torch.equal(first.model[0].weight, other.model[0].weight)


def test_meta_and_mode(model_file):
    result = loaded(f"{model_file}:model", inputs=["2x24"], device="meta", training=False)
    assert result.model[0].weight.is_meta
    assert not result.args[0].is_meta
    assert not result.model.training
    assert loaded(f"{model_file}:model", inputs=["2x24"]).model.training


def test_a_file_does_not_replace_a_module_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # or processes that later tests start would import it
    path = tmp_path / "torch.py"
    path.write_text("def model():\n    from torch import nn\n    return nn.Linear(2, 2)\n", encoding="utf-8")
    loaded(f"{path}:model", inputs=["2x2"])
    assert sys.modules["torch"] is torch


@pytest.mark.parametrize(
    ("source", "shapes"),
    [
        ("timm:resnet18", {None: (2, 3, 224, 224)}),
        ("torchvision:resnet18", {None: (2, 3, 224, 224)}),
        ("torchvision:inception_v3", {None: (2, 3, 299, 299)}),
        ("torchvision:regnet_y_400mf", {None: (2, 3, 224, 224)}),
        ("torchvision:fcn_resnet50", {None: (2, 3, 224, 224)}),
        ("hf:gpt2", {"input_ids": (2, 32)}),
        ("hf:bert", {"input_ids": (2, 32)}),
        ("hf:t5", {"input_ids": (2, 32), "decoder_input_ids": (2, 32)}),
        ("hf:vit", {"pixel_values": (2, 3, 224, 224)}),
        ("hf:clip", {"input_ids": (2, 32), "pixel_values": (2, 3, 224, 224)}),
        ("hf:whisper", {"input_features": (2, 80, 3000), "decoder_input_ids": (2, 32)}),
    ],
)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # of the zoos, at import
def test_models_of_the_zoos_come_with_their_inputs(source, shapes):
    skip_without({"hf": "transformers"}.get(source.partition(":")[0], source.partition(":")[0]))
    result = loaded(source, device="meta")
    given = {None: result.args[0]} if result.args else result.kwargs
    assert {name: tuple(value.shape) for name, value in given.items()} == shapes
    assert all(parameter.is_meta for parameter in result.model.parameters())
    assert not getattr(getattr(result.model, "config", None), "use_cache", False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_transformers_configuration_file_with_settings(tmp_path):
    skip_without("transformers")
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 50}), encoding="utf-8"
    )
    result = loaded(path, device="cpu", settings=["num_hidden_layers=2", "intermediate_size=48", "num_key_value_heads=2"])
    assert len(result.model.model.layers) == 2
    assert int(result.kwargs["input_ids"].max()) < 50
    assert torch.isfinite(result.model(**result.kwargs).logits).all()
    with pytest.raises(UnknownNameError, match=r"no entry 'num_hidden_layer'; did you mean num_hidden_layers"):
        loaded(path, settings=["num_hidden_layer=2"])


# Refusals


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet18", "has no known form"),
        ("timm:", "has no known form"),
        ("nowhere.at.all:model", "no module 'nowhere'"),
        ("missing.py:model", "no file missing.py"),
        ("missing/config.json", "cannot read"),
        ("{file}:modle", "no 'modle'; did you mean model"),
        ("{file}:number", "is of type int, not a callable"),
        ("{file}:not_a_model", "returned str"),
        ("{file}:fails", "RuntimeError: no such width .at small_model.py:25: raise"),
        ("{file}:model", "comes without inputs"),
    ],
)
def test_a_bad_model_argument_is_one_message_and_exit_code_2(model_file, source, message):
    result = run("inspect", source.format(file=model_file))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    with pytest.raises(InputError, match=message):
        loaded(source.format(file=model_file))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_an_unknown_zoo_model_is_refused_with_the_nearest_names(library):
    skip_without(library)
    with pytest.raises(UnknownNameError, match="no model 'resnet18x'; did you mean resnet18"):
        loaded(f"{library}:resnet18x")


def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'gainstage\[transformers\]'"):
        loaded("hf:gpt2")


@pytest.mark.parametrize("text", ["", "2x", "x3", "axb", "2x3:complex", "2x0", "ids=2x3:int:0", "2 x 3", "2x3:float:7"])
def test_a_bad_input_is_refused(text):
    with pytest.raises(InputError, match="--input"):
        parse_input(text)


def test_inputs():
    assert parse_input("2x3") == InputSpecification(shape=(2, 3))
    assert parse_input("ids=2x32:int:9") == InputSpecification(shape=(2, 32), name="ids", kind="int", below=9)
    model = nn.ModuleList([nn.Embedding(7, 2), nn.Embedding(5, 2)])
    assert smallest_vocabulary(model) == 5
    specifications = [parse_input(text) for text in ("64x3", "ids=64x64:int", "few=64x64:int:2", "mask=3:bool")]
    args, kwargs = draw_inputs(specifications, vocabulary=5)
    assert args[0].shape == (64, 3)
    assert kwargs["ids"].unique().tolist() == [0, 1, 2, 3, 4]
    assert kwargs["few"].unique().tolist() == [0, 1]
    assert kwargs["mask"].all()
    with pytest.raises(InputError, match="ids= is given twice"):
        draw_inputs(specifications[1:2] * 2, vocabulary=5)


def test_settings():
    assert parse_settings(["a=1", "b=[2, 3]", "c=gelu", "d=true", "e=None", "f=x=y"]) == {
        "a": 1,
        "b": [2, 3],
        "c": "gelu",
        "d": True,
        "e": None,
        "f": "x=y",
    }
    with pytest.raises(InputError, match="not KEY=VALUE"):
        parse_settings(["depth"])


# Commands


def test_inspect_groups_repeated_layers_and_json_has_each(model_file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # test runners set their own
    table = run("inspect", f"{model_file}:with_inputs")
    assert table.exit_code == 0
    assert "{0..4..2}" in table.stdout
    assert "Linear" in table.stdout
    ungrouped = run("inspect", f"{model_file}:with_inputs", "--all").stdout
    assert "{" not in ungrouped
    assert len(ungrouped.splitlines()) == len(table.stdout.splitlines()) + 4
    modules = json.loads(run("inspect", f"{model_file}:with_inputs", "--json").stdout)["modules"]
    assert {module["path"] for module in modules} == {"", "0", "1", "2", "3", "4", "5"}
    assert modules[0]["outputs"][0]["shape"] == [5, 24]


@pytest.mark.parametrize("columns", [80, 100])
def test_no_line_is_wider_than_the_terminal(model_file, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = run("inspect", f"{model_file}:with_inputs").stdout + run("rules").stdout
    assert max(map(len, shown.splitlines())) <= columns


def test_ops_counts_the_operations_of_a_model_without_values(model_file):
    found = json.loads(run("ops", f"{model_file}:model", "--input", "2x24", "--meta", "--json").stdout)
    assert (found["rung"], found["assumptions"]) == ("export", [])
    assert {row["op"]: (row["count"], row["treatment"]) for row in found["operations"]} == {
        "aten.linear.default": (3, "ruled"),
        "aten.relu.default": (3, "ruled"),
    }
    assert "2 operations, 6 nodes: 6 ruled (rung export)" in run("ops", f"{model_file}:model", "--input", "2x24").stdout


def test_ops_says_that_one_path_was_seen_and_why(model_file):
    shown = run("ops", f"{model_file}:branching", "--input", "2x24").stdout
    assert "(rung tape)" in shown
    assert "One path seen" in shown
    assert "torch.export refused" in shown


def test_rules_lists_the_registry():
    from gainstage.rules import rules

    rows = json.loads(run("rules", "--json").stdout)
    assert {row["op"] for row in rows} == {str(op) for op in rules()}
    assert all(row["rule"] for row in rows)


def test_drawing_reports_its_progress(model_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(progress, "progress_bar", lambda what: nullcontext(lambda *counts: seen.append((what, *counts))))
    source, plan_file = f"{model_file}:with_inputs", tmp_path / "plan.json"
    run("plan", source, "--output", plan_file)
    assert run("apply", source, "--plan", plan_file, "--output", tmp_path / "state.pt").exit_code == 0
    assert seen[-1][0] == "drawing"
    assert seen[-1][1] == seen[-1][2]


def test_derivations_on_request(model_file):
    source = f"{model_file}:with_inputs"
    shown = run("plan", source, "--explain", "*.weight", "--explain", "2.bias").stdout
    planned = gainstage.Plan.from_json(run("plan", source, "--json").stdout)
    assert " ".join(shown.split()) == " ".join(
        " ".join(planned.explain(f"{layer}").split()) for layer in ("0.weight", "2.weight", "4.weight", "2.bias")
    )
    refused = run("plan", source, "--explain", "2.wieght")
    assert refused.exit_code == 2
    assert "2.weight" in refused.stderr


def test_a_plan_is_written_applied_and_verified(model_file, tmp_path):
    source, plan_file, state_file = f"{model_file}:with_inputs", tmp_path / "plan.json", tmp_path / "state.pt"
    written = run("plan", source, "--output", plan_file, "--seed", 1)
    assert written.exit_code == 0, written.output
    planned = gainstage.Plan.from_json(plan_file.read_text(encoding="utf-8"))
    assert list(planned.parameters) == [f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
    assert "{0..4..2}.weight" in run("plan", source).stdout
    assert gainstage.Plan.from_json(run("plan", source, "--seed", 1, "--json").stdout) == planned

    assert run("apply", f"{model_file}:model", "--plan", plan_file, "--seed", 3, "-o", state_file).exit_code == 0
    state = torch.load(state_file, weights_only=True)
    for layer in (0, 2, 4):
        std = planned.parameters[f"{layer}.weight"].distribution.std
        # 576 entries: the standard deviation of a standard deviation is 1 / sqrt(2 * 576) = 3 %; four of them.
        assert float(state[f"{layer}.weight"].std()) == pytest.approx(std, rel=0.12)

    assert run("verify", source, "--plan", plan_file).exit_code == 0
    same = (f"{model_file}:model", "--input", "16x24", "--plan", plan_file, "--json")
    in_pieces = run("verify", *same, "--meta")
    assert in_pieces.exit_code == 0, in_pieces.output
    assert in_pieces.stdout == run("verify", *same).stdout
    assert run("verify", source, "--plan", plan_file, "--weights", state_file).exit_code == 0
    state["2.weight"] *= 30
    torch.save(state, state_file)
    faulty = run("verify", source, "--plan", plan_file, "--weights", state_file)
    assert faulty.exit_code == 1
    assert "NOT OK" in faulty.stdout
    assert json.loads(run("verify", source, "--plan", plan_file, "--weights", state_file, "--json").stdout)["ok"] is False


@pytest.mark.parametrize("text", ["{}", "not json"])
def test_a_damaged_plan_is_refused(model_file, tmp_path, text):
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    result = run("verify", f"{model_file}:with_inputs", "--plan", tmp_path / "plan.json")
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_role_without_a_pattern_is_refused(model_file):
    result = run("plan", f"{model_file}:with_inputs", "--role", "residual")
    assert result.exit_code == 2
    assert "is not PATTERN=ROLE" in result.stderr


def test_roles_with_their_reasons_and_as_overridden(model_file):
    shown = run("inspect", "--roles", "--meta", f"{model_file}:with_inputs")
    assert shown.exit_code == 0, shown.output
    found = json.loads(run("inspect", "--roles", "--json", f"{model_file}:with_inputs").output)
    assert all(entry["role"] in shown.output for entry in found.values())
    assert found["0.weight"]["role"] == "hidden"
    changed = json.loads(run("inspect", "--roles", "--json", "--role", "0=output_head", f"{model_file}:with_inputs").output)
    assert changed["0.weight"]["role"] == "output_head"
    assert "override" in changed["0.weight"]["uses"][0]["reason"]


def test_roles_that_are_asked_of_a_prediction(model_file):
    refused = run("inspect", "--role", "a=hidden", f"{model_file}:with_inputs")
    assert refused.exit_code == 2
    assert "go with --roles" in refused.output


DROPPING = """
import torch
from torch import nn


def model():
    return nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Dropout(0.75), nn.Linear(64, 4)), (torch.randn(512, 24),)
"""


def test_modes_show_what_dropout_adds_in_training(tmp_path):
    path = tmp_path / "dropping.py"
    path.write_text(DROPPING, encoding="utf-8")
    rows = {row["path"]: row for row in json.loads(run("inspect", "--modes", "--json", f"{path}:model").output)}
    assert list(rows) == ["2", "3", ""]
    assert rows["2"]["evaluation"] / rows["2"]["training"] == pytest.approx(0.25)  # the mean stays, the square is divided
    shown = run("inspect", "--modes", f"{path}:model")
    assert "evaluation" in shown.output
    assert "0.25" in shown.output
