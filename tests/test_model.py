"""Loading: what a model says about itself is believed, what it cannot say is refused with what to do."""

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from edgeformer import model as models  # noqa: E402
from edgeformer.errors import BadInput  # noqa: E402
from edgeformer.model import Model, load  # noqa: E402
from edgeformer_agent import wire  # noqa: E402

TEXTS = [name for name in families.NAMES if name != "vit"]


def bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    return hf.BertModel(hf.BertConfig(**{**families.TEXT, **changes})).eval()


def names(model: Model) -> list[str]:
    return [x.name for x in model.inputs]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "Tiny BERT"
    bert().save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))


def run(model: Model, ids: list[int], padded: int = 0) -> Any:
    """One row, alone; with `padded` more tokens behind it as a runner fills them in."""
    row = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
    tensors = [torch.tensor([row[x.name] + [int(x.pad)] * padded], dtype=torch.int32) for x in model.inputs]
    with torch.no_grad():
        return model.module(*tensors)[0]


# --- from a folder ------------------------------------------------------------------------------------------------


def test_from_a_folder(saved: Path) -> None:
    model = load(saved)
    assert model.name == "tiny-bert"
    assert model.inputs == tuple(wire.Tensor(n, "int32", (-1, -1), 0) for n in models._TEXT_INPUTS)
    assert model.output == wire.Tensor("sentence_embedding", "float32", (-1, 32))
    assert model.task == wire.Task("embedding")
    assert model.lengths == (32, 64, 66) and model.max_length == 66
    assert model.tokenizer("w3 w4")["input_ids"] == [2, 5, 6, 3]
    files = dict(model.files or {})
    assert {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "licences/model-LICENSE"} == set(files)
    assert files["licences/model-LICENSE"] == b"free"
    assert files["tokenizer/tokenizer.json"] == (saved / "tokenizer.json").read_bytes()
    assert not model.module.training


def test_a_folder_and_its_object_are_one_model(saved: Path) -> None:
    first, again, of = load(saved), load(str(saved)), load(bert())
    assert first.history == again.history == of.history
    ids = [2, 9, 50, 3]
    torch.testing.assert_close(run(first, ids), run(of, ids), rtol=0, atol=0)


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert load(folder).tokenizer is None
    with pytest.raises(BadInput, match="has no tokenizer"):
        from edgeformer import data

        data.load(load(folder), ["w3"], None)


MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def pooling(mode: str) -> dict[str, Any]:
    """As sentence-transformers 5 and before write it."""
    return {"word_embedding_dimension": 32, **{f"pooling_mode_{m}": m == mode for m in MODES}, "include_prompt": True}


@pytest.mark.parametrize(
    ("said", "take"),
    [
        (None, "mean"),
        (pooling("cls_token"), "cls"),
        (pooling("mean_tokens"), "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "cls"}, "cls"),  # sentence-transformers 6
        ({"embedding_dimension": 32, "pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_pooling(folder: Path, said: dict[str, Any] | None, take: str) -> None:
    if said is not None:
        edit(folder, "1_Pooling/config.json", **said)
    ids = [2, 9, 50, 3]
    hidden = bert()(torch.tensor([ids])).last_hidden_state[0].detach()
    vector = hidden[0] if take == "cls" else hidden.mean(0)
    torch.testing.assert_close(run(load(folder), ids), vector / vector.norm(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "said",
    [
        *(pooling(m) for m in MODES[2:]),
        {**pooling("cls_token"), "pooling_mode_mean_tokens": True},
        {"pooling_mode": "lasttoken"},
        {"pooling_mode": ["cls", "mean"]},
    ],
)
def test_another_pooling_is_refused_not_replaced(folder: Path, said: dict[str, Any]) -> None:
    edit(folder, "1_Pooling/config.json", **said)
    with pytest.raises(BadInput, match=r"pooling .*; this version builds mean or cls"):
        load(folder)


def test_layers_behind_the_pooling_are_refused(folder: Path) -> None:
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    listed = [{"idx": i, "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(BadInput, match=r"modules.json lists Dense,"):
        load(folder)
    (folder / "modules.json").write_text(json.dumps([x for x in listed if "Dense" not in x["type"]]))
    assert load(folder).name == "model"


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
def test_a_pretraining_head_is_left_out(tmp_path: Path, kind: str) -> None:
    """Twice the same: weights that the checkpoint lacks (the pooler) would be random."""
    torch.manual_seed(1)
    whole = getattr(hf, kind)(hf.BertConfig(**families.TEXT)).eval()
    whole.save_pretrained(tmp_path)
    first, again, of = load(tmp_path), load(tmp_path), load(whole)
    assert first.task == of.task == wire.Task("embedding")
    assert first.history == again.history == of.history
    torch.testing.assert_close(run(of, [2, 7, 3]), run(first, [2, 7, 3]))


def test_a_missing_head_is_not_made_up(folder: Path) -> None:
    edit(folder, architectures=["BertForSequenceClassification"])
    with pytest.raises(BadInput, match=r"lacks weights of BertForSequenceClassification: classifier\.bias"):
        load(folder)


@pytest.mark.parametrize("kind", ["BertForNextSentencePrediction", "BertForMultipleChoice"])
def test_unsupported_heads(folder: Path, kind: str) -> None:
    message = f"{kind}: this version builds ForSequenceClassification, ForImageClassification, .* heads"
    edit(folder, architectures=[kind])
    with pytest.raises(BadInput, match=message):
        load(folder)
    with pytest.raises(BadInput, match=message):
        load(getattr(hf, kind)(hf.BertConfig(**families.TEXT)))


# --- folders and names that are refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "a/b/c", "~/none-here", "../none"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(BadInput, match=r"is not a folder with config.json and \*.safetensors, nor a hub id"):
        load(name)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(BadInput, match="is not a folder"):
        load(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["nobody-here/no-such-model", "no-such-model", "bad name/x", "a--b/..c"])
def test_a_hub_id_offline(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As with HF_HUB_OFFLINE=1, which is read when the library is imported."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(BadInput, match=r"no folder .*, and the hub") as error:
        load(name)
    assert len(str(error.value).splitlines()) == 1 and repr(name) in str(error.value)
    assert capfd.readouterr() == ("", "") and not caplog.records


class Trap:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("also", [False, True], ids=["alone", "beside other safetensors"])
def test_pickled_weights_are_not_opened(folder: Path, also: bool) -> None:
    trap = folder / "opened"
    torch.save({"x": Trap(trap)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    if also:
        save_file({"x": torch.ones(1)}, folder / "adapter.safetensors")
    says = "cannot be loaded: .*safetensors" if also else r"needs config.json and \*.safetensors \(pickled"
    with pytest.raises(BadInput, match=says):
        load(folder)
    assert not trap.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trap.exists()  # the trap works


def test_code_that_came_with_a_model_is_not_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trap = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nfrom transformers import BertConfig as Config")
    edit(folder, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(BadInput, match="custom code"):
        load(folder)
    assert not trap.exists()
    assert "[y/N]" not in capfd.readouterr().out  # nobody is asked, and nothing waits


@pytest.mark.parametrize("file", ["config.json", "1_Pooling/config.json", "modules.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["{", "", "\x00", '{"model_type": '])
def test_damaged_json(folder: Path, file: str, content: str) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(content)
    with pytest.raises(BadInput, match="cannot be loaded") as error:
        load(folder)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("changes", [{"model_type": None}, {"model_type": "no-such"}, {"hidden_size": 16}])
def test_a_config_that_does_not_fit(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(BadInput, match="cannot be loaded"):
        load(folder)


def test_damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match="cannot be loaded: SafetensorError"):
        load(folder)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"needs config.json and \*.safetensors .*save_pretrained"):
        load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][3] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"weight encoder\.layer\.1\.output\.dense\.bias holds NaN or infinity"):
        load(folder)


# --- from an object -----------------------------------------------------------------------------------------------


def test_an_object_is_not_changed() -> None:
    mine = bert().half().train()
    attention, state = mine.config._attn_implementation, copy.deepcopy(mine.state_dict())
    assert attention == "sdpa"
    made = load(mine, lengths=(8,))
    with torch.no_grad():
        for parameter in made.module.parameters():
            parameter.zero_()
    assert mine.config._attn_implementation == attention and mine.training
    assert {k: v.dtype for k, v in mine.state_dict().items()} == dict.fromkeys(state, torch.float16)
    for key, value in mine.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert made.module.module.config._attn_implementation == "eager"
    assert {p.dtype for p in made.module.parameters()} == {torch.float32} and not made.module.training


def test_the_tokenizer_of_an_object_gives_the_pad() -> None:
    assert load(bert(pad_token_id=7)).inputs[0].pad == 7
    model = load(bert(pad_token_id=7), tokenizer=families.tokenizer())
    assert [x.pad for x in model.inputs] == [0, 0, 0] and model.tokenizer is not None
    assert [x.pad for x in load(families.tiny("roberta")).inputs] == [1, 0, 0]


def test_segments_are_an_input_only_where_there_is_more_than_one() -> None:
    assert names(load(bert())) == ["input_ids", "attention_mask", "token_type_ids"]
    one = bert(type_vocab_size=1)
    for tokenizer in (None, families.tokenizer()):  # which gives segment 1 for a pair: out of the table
        assert names(load(one, tokenizer=tokenizer)) == ["input_ids", "attention_mask"]
        assert names(load(families.tiny("distilbert"), tokenizer=tokenizer)) == ["input_ids", "attention_mask"]
        assert names(load(families.tiny("electra"), tokenizer=tokenizer))[2] == "token_type_ids"


@pytest.mark.parametrize(
    ("family", "limit"),
    [
        ("bert", 66),
        ("distilbert", 64),
        ("roberta", 64),
        ("electra", 66),
        ("mpnet", 64),
        ("modernbert", 66),
        ("llama", 320),
    ],
)
def test_positions(family: str, limit: int) -> None:
    """RoBERTa and MPNet count from the padding index on: of 66 positions, 64 are of use. The longest row runs."""
    model = load(families.tiny(family))
    assert model.max_length == limit
    assert torch.isfinite(run(model, [5 + i % 90 for i in range(limit)])).all()
    with pytest.raises(BadInput, match=f"length {limit + 1} is over the model's {limit} positions"):
        load(families.tiny(family), lengths=(limit + 1,))
    if family not in ("modernbert", "llama"):  # whose positions are computed
        with pytest.raises((IndexError, RuntimeError)):
            run(model, [5] * (limit + 1))


@pytest.mark.parametrize("family", TEXTS)
def test_padding_does_not_matter(family: str) -> None:
    model = load(families.tiny(family))
    random = torch.Generator().manual_seed(3)
    for length, padded in ((1, 5), (7, 1), (13, 19), (31, 33)):
        ids = torch.randint(5, 200, (length,), generator=random).tolist()
        alone, filled = run(model, ids), run(model, ids, padded)
        per_token = model.output.shape[1] == -1  # a row of the output for each token, padding included
        torch.testing.assert_close(filled[:length] if per_token else filled, alone, rtol=1e-4, atol=2e-6)
        ignored = run(model, [*ids, *[int(model.inputs[0].pad)] * padded])
        assert (
            (ignored[:length] if per_token else ignored) - alone
        ).abs().max() > 1e-4  # so an ignored mask would show


@pytest.mark.parametrize("family", families.NAMES)
def test_rows_of_a_batch_do_not_see_each_other(family: str) -> None:
    model = load(families.tiny(family))
    first, second = model.example(9), model.example(9)
    first = (torch.randn(first[0].shape) if family == "vit" else first[0] * 11, *first[1:])
    with torch.no_grad():
        both = model.module(*(torch.cat(pair) for pair in zip(first, second, strict=True)))
        torch.testing.assert_close(both[0], model.module(*first)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[1], model.module(*second)[0], rtol=1e-4, atol=1e-5)


def test_an_embedding_has_length_one() -> None:
    assert run(load(bert()), [2, 8, 9, 3]).norm().item() == pytest.approx(1)


def test_images() -> None:
    model = load(families.tiny("vit"))
    assert model.inputs == (wire.Tensor("pixel_values", "float32", (-1, 3, 32, 32)),)
    assert model.lengths == () and model.max_length == 0
    assert model.task == wire.Task("classification", None, False, tuple(f"LABEL_{i}" for i in range(5)))
    assert model.output == wire.Tensor("logits", "float32", (-1, 5))
    with pytest.raises(BadInput, match="has no sequence input, so lengths="):
        load(families.tiny("vit"), lengths=(16,))
    wide = hf.ViTModel(hf.ViTConfig(**{**families.tiny("vit").config.to_dict(), "image_size": [16, 32]}))
    assert load(wide).inputs[0].shape == (-1, 3, 16, 32)


@pytest.mark.parametrize(
    ("changes", "kind", "labels"),
    [
        ({"num_labels": 3}, "classification", ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"id2label": {1: "good", 0: "bad"}}, "classification", ("bad", "good")),
        ({"num_labels": 1}, "regression", ()),
        ({"num_labels": 2, "problem_type": "regression"}, "regression", ()),
    ],
)
def test_the_task_is_what_the_head_is(changes: dict[str, Any], kind: str, labels: tuple[str, ...]) -> None:
    model = load(hf.BertForSequenceClassification(hf.BertConfig(**families.TEXT, **changes)))
    assert (model.task.kind, model.task.labels, model.output.name) == (kind, labels, "logits")


def test_heads_with_an_output_a_token() -> None:
    ids = torch.tensor([[5, 6, 7]])
    tagger, reader = families.tiny("electra"), families.tiny("distilbert")
    model = load(tagger)
    assert model.task == wire.Task("token_classification", labels=("O", "B-PER", "I-PER"))
    assert model.output == wire.Tensor("logits", "float32", (-1, -1, 3)) and model.past is None
    torch.testing.assert_close(run(model, [5, 6, 7]), tagger(ids).logits[0].detach())
    model = load(reader)
    assert model.task == wire.Task("question_answering") and model.output.shape == (-1, -1, 2)
    wanted = reader(ids)
    torch.testing.assert_close(run(model, [5, 6, 7]).T, torch.cat((wanted.start_logits, wanted.end_logits)).detach())


def test_a_decoder_tells_the_token_after_the_last_valid_one() -> None:
    """In one go, or the second half with the keys and values of the first."""
    whole = families.tiny("llama")
    model, ids = load(whole), torch.arange(5, 25, dtype=torch.int32)[None]
    assert model.task == wire.Task("next_token") and model.output.shape == (-1, 200)
    assert model.past == wire.Tensor("past", "float32", (-1, 4, 2, -1, 16))
    with torch.no_grad():
        wanted = whole(ids.long()).logits[0, -1]
        torch.testing.assert_close(run(model, ids[0].tolist()), wanted)
        _, first = model.module(ids[:, :13], torch.ones_like(ids[:, :13]), torch.zeros(1, 4, 2, 0, 16))
        logits, second = model.module(ids[:, 13:], torch.ones_like(ids[:, 13:]), first)
    torch.testing.assert_close(logits[0], wanted)
    assert (first.shape, second.shape) == ((1, 4, 2, 13, 16), (1, 4, 2, 7, 16))


def test_what_is_no_cache_of_all_tokens_is_no_past() -> None:
    window = hf.MistralConfig(
        **{**families.TEXT, "hidden_size": 64}, num_key_value_heads=2, sliding_window=8, pad_token_id=0
    )
    assert load(hf.MistralForCausalLM(window)).past is None
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32))
    assert load(gpt2).past == wire.Tensor("past", "float32", (-1, 2, 2, -1, 16))


def test_a_headless_model_is_an_embedding_whatever_its_config_says() -> None:
    assert load(bert(num_labels=3)).task == wire.Task("embedding")


def test_a_head_gives_raw_logits() -> None:
    whole = families.tiny("roberta")
    ids = [5, 6, 7]
    torch.testing.assert_close(run(load(whole), ids), whole(torch.tensor([ids])).logits[0].detach())


# --- from a plain module ------------------------------------------------------------------------------------------


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, a: Any, b: Any) -> Any:
        return self.layer(a) - b


def test_a_plain_module_with_a_tuple() -> None:
    module = Two()
    model = load(module, example=(torch.ones(1, 3), torch.zeros(1, 2)))
    assert model.inputs == (wire.Tensor("x0", "float32", (-1, 3)), wire.Tensor("x1", "float32", (-1, 2)))
    assert (model.name, model.task, model.lengths) == ("two", wire.Task("embedding"), ())
    a, b = torch.randn(4, 3), torch.randn(4, 2)
    torch.testing.assert_close(model.module(a, b), module(a, b))
    model.module.module.layer.weight.data.zero_()
    assert module.layer.weight.abs().sum() > 0


def test_a_plain_module_with_a_dict() -> None:
    """Names, not positions: the keys stand in another order than the arguments."""
    module = Two()
    model = load(module, example={"b": torch.zeros(1, 2), "a": torch.ones(1, 3)}, name="My Two")
    assert (model.name, names(model)) == ("my-two", ["b", "a"])
    a, b = torch.randn(4, 3), torch.randn(4, 2)
    torch.testing.assert_close(model.module(b, a), module(a, b))


def test_a_list_is_as_good_as_a_tuple() -> None:
    example: Any = [torch.ones(1, 3), torch.zeros(1, 2)]
    assert names(load(Two(), example=example)) == ["x0", "x1"]


@pytest.mark.parametrize("example", [None, (), {}, torch.ones(1, 3), torch.ones(1)], ids=str)
def test_no_example(example: Any) -> None:
    with pytest.raises(BadInput, match=r"needs example=\(tensor, ...\)"):
        load(Two(), example=example)


@pytest.mark.parametrize("bad", [torch.tensor(1.0), torch.ones(3), torch.ones(2, 3), torch.ones(0, 3)])
def test_an_example_without_a_batch_axis(bad: Any) -> None:
    with pytest.raises(BadInput, match="needs a batch axis of 1, got"):
        load(Two(), example=(torch.ones(1, 3), bad))


class Returns(torch.nn.Module):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Any) -> Any:
        return self.make(x)


@pytest.mark.parametrize("make", [lambda x: (x, 0), lambda x: {"y": x, "z": 0}, lambda x: [x]])
def test_the_first_of_several_outputs(make: Callable[[Any], Any]) -> None:
    x = torch.ones(1, 3)
    assert torch.equal(load(Returns(make), example=(x,)).module(x), x)


@pytest.mark.parametrize("make", [lambda x: x[0], lambda x: x.sum(), lambda x: x.argmax(1), lambda x: (1, x)])
def test_outputs_of_no_use(make: Callable[[Any], Any]) -> None:
    with pytest.raises(BadInput, match="Returns must return floats with the batch axis first, got"):
        load(Returns(make), example=(torch.ones(1, 3),))


def test_an_example_goes_with_a_plain_module_only(saved: Path) -> None:
    for source in (saved, bert()):
        with pytest.raises(BadInput, match="example inputs go with a plain module"):
            load(source, example=(torch.ones(1, 3),))
    with pytest.raises(BadInput, match="brings its own"):
        load(saved, tokenizer=families.tokenizer())


# --- lengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(32, 16), (16, 16), (0, 16), (-1,), ()])
def test_lengths_that_make_no_sense(lengths: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="must be ascending, different and positive"):
        load(bert(), lengths=lengths)


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [
        (20, (20,)),
        (32, (32,)),
        (130, (32, 64, 128, 130)),
        (512, (32, 64, 128, 256, 512)),
        (1000, (32, 64, 128, 256, 512)),
    ],
)
def test_default_lengths(positions: int, lengths: tuple[int, ...]) -> None:
    assert load(bert(max_position_embeddings=positions)).lengths == lengths


def test_asked_lengths_may_pass_the_default_limit() -> None:
    model = load(bert(max_position_embeddings=1000), lengths=(100, 1000))
    assert model.lengths == (100, 1000) and model.max_length == 1000


# --- name and history ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("../../x", "x"),
        ("..", "model"),
        ("a/..", "model"),
        ("..\\..\\x", "x"),
        ("", "model"),
        ("...", "model"),
        ("-rf", "rf"),
        (".hidden", "hidden"),
        ("日本", "model"),
        ("Größe 2", "gr--e-2"),
        ("Ünicode.v1", "nicode.v1"),
        ("org/All-MiniLM_L6.v2", "all-minilm_l6.v2"),
        ("a\0b\nc", "a-b-c"),
        ("x.", "x"),
        ("²", "model"),  # alphanumeric, and not ASCII
        ("y" * 300, "y" * 64),
        ("y" * 63 + "..z", "y" * 63),
    ],
)
def test_a_name_is_a_safe_folder_name(name: str, slug: str, tmp_path: Path) -> None:
    assert models._slug(name) == slug
    made = load(torch.nn.Linear(3, 2), example=(torch.ones(1, 3),), name=name)
    assert made.name == (slug if name else "linear")
    (tmp_path / f"{made.name}-raspberry-pi-4").mkdir()
    assert [p.name for p in tmp_path.iterdir()] == [f"{made.name}-raspberry-pi-4"]


def test_history_says_what_went_in_and_not_where_it_was(saved: Path) -> None:
    model = load(saved)
    (step,) = model.history
    assert step.name == "load"
    assert step.facts == {
        "architecture": "BertModel",
        "parameters": sum(p.numel() for p in bert().parameters()),
        "weights_sha256": step.facts["weights_sha256"],
        "output": "sentence_embedding",
    }
    assert len(step.facts["weights_sha256"]) == 64
    said = repr((model.history, model.name, model.inputs, list(model.files or {})))
    assert "/tmp" not in said and str(saved.parent) not in said and saved.parent.name not in said


def test_the_digest_is_of_the_weights() -> None:
    def digest(module: Any, **more: Any) -> str:
        return str(load(module, **more).history[0].facts["weights_sha256"])

    first = digest(bert())
    assert digest(bert(), name="other", lengths=(8,)) == first
    keys = sorted(bert().state_dict())
    for name in (keys[0], keys[len(keys) // 2], keys[-1]):
        module = bert()
        with torch.no_grad():
            flat = module.get_parameter(name).view(-1)
            flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
        assert digest(module) != first, name
    identity, layer, one = torch.nn.Identity(), torch.nn.Linear(3, 2), (torch.ones(1, 3),)
    behind, before = torch.nn.Sequential(identity, layer), torch.nn.Sequential(layer, identity)
    assert digest(behind, example=one) != digest(before, example=one)  # the same values by other names
    swapped = bert()
    layers = swapped.encoder.layer
    layers[0], layers[1] = layers[1], layers[0]
    assert digest(swapped) != first


def test_buffers_count_too() -> None:
    norm = torch.nn.BatchNorm1d(3)
    first = load(norm, example=(torch.ones(1, 3),)).history
    norm.running_mean += 1
    assert load(norm, example=(torch.ones(1, 3),)).history != first


def test_after_keeps_the_rest() -> None:
    model = load(bert())
    later = model.after("prune", facts={"kept": 0.5}, lengths=(8,))
    assert later.history == (*model.history, wire.Step("prune", {"kept": 0.5}))
    assert (later.lengths, later.module, later.name) == ((8,), model.module, model.name)
    assert model.lengths == (32, 64, 66) and len(model.history) == 1
    other = torch.nn.Identity()
    assert model.after("swap", other, facts={}).module is other


def test_an_example_fits_the_model() -> None:
    for family in families.NAMES:
        model = load(families.tiny(family))
        example = model.example(7, batch=2)
        assert [x.dtype for x in example] == [getattr(torch, x.dtype) for x in model.inputs]
        assert all(x.shape[0] == 2 and (family == "vit" or x.shape == (2, 7)) for x in example)
        assert model.module(*example).shape[0] == 2
