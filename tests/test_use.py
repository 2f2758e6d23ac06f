"""What others take from a basis: an exported model, and a reward for trainers."""

import json
import math
import os
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from demos import build_model, state_alone
from helpers import (
    fresh_process,
    input_error,
    outcome,
    planted_basis,
    planted_weights,
)
from test_embedding import ARCHITECTURES, save_random_model
from transformers import AutoModelForSequenceClassification

import lore.embedding
import lore.export
import lore.reward_model
import lore.standin
import utils
from lore.export import export_reward_model
from lore.files import digest_of, load_tensors, save_tensors
from lore.reward_model import (
    load_reward_head,
    load_reward_model,
    load_tokenizer,
    model_identity,
)
from lore.rewards import best_of_n, personal_reward, rewards_of_group
from lore.tables import markdown_text

pytestmark = pytest.mark.usefixtures("one_thread")
D, K = 64, 3


def message(role, text):
    return {"role": role, "content": text}


CONVERSATIONS = [
    [
        message("user", "Where do we eat?"),
        message("assistant", "At the pier."),
    ],
    [
        message("user", "And then?"),
        message("assistant", "We walk home along the canal, if it does not rain."),
    ],
    [
        message("user", "One?"),
        message("assistant", "Two."),
        message("user", "Three?"),
        message("assistant", "Four, and then we stop."),
    ],
]
# What a server does: padded batches, with the pad token that the folder names. It runs without this
# repository.
SERVER = """
import importlib.util, json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
assert importlib.util.find_spec("utils") is None
assert importlib.util.find_spec("lore") is None
folder = sys.argv[1]
conversations = json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations]
tokens = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(tokens["input_ids"], tokens["attention_mask"]).logits
print(json.dumps({
    "logits": logits.tolist(),
    "dtype": str(logits.dtype),
    "class": type(model).__name__,
    "problem_type": model.config.problem_type,
    "labels": model.config.id2label,
    "pad_token": tokenizer.pad_token,
    "pad_ids": [model.config.pad_token_id, tokenizer.pad_token_id],
}))
"""


def change_json(path, **values):
    """Replace entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A reward model in one file."""
    return build_model(tmp_path_factory.mktemp("models") / "single", hidden_size=D)


@pytest.fixture(scope="module")
def sharded(single, tmp_path_factory):
    """The same model in several files, one of which holds the head and more.

    Its embeddings are tied, and its pad token also ends a turn.
    """
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "sharded"
    shutil.copytree(single, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForSequenceClassification.from_pretrained(single).save_pretrained(
        folder, max_shard_size="200KB"
    )
    change_json(folder / "config.json", tie_word_embeddings=True, pad_token_id=3)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            change_json(folder / name, pad_token="<|eot_id|>")
    return folder


@pytest.fixture(scope="module")
def basis():
    """(V `[d, K]`, the weights of seven users `[7, K]`)"""
    return planted_basis(D, K, length=30.0), planted_weights(7, K)


def refuse(*arguments, **options):
    """Stands in for a function that a test does not allow."""
    raise OSError("not allowed here")


# ---- A tokenizer that is loaded already


def test_a_tokenizer_that_is_given_is_not_loaded_again(monkeypatch, single, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(single)
    without_tokenizer = tmp_path / "model"
    without_tokenizer.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(single / name, without_tokenizer)
    monkeypatch.setattr(lore.reward_model, "load_tokenizer", refuse)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)

    backbone, given = load_reward_model(str(without_tokenizer), "cpu", tokenizer=tokenizer)
    assert given is tokenizer
    _, given = load_reward_model(
        str(without_tokenizer), "cpu", tokenizer_name="no such tokenizer", tokenizer=tokenizer
    )
    assert given is tokenizer

    monkeypatch.undo()
    whole, _ = load_reward_model(str(single), "cpu")
    state = state_alone(whole, tokenizer, CONVERSATIONS[0])
    assert torch.equal(state_alone(backbone, tokenizer, CONVERSATIONS[0]), state)


# ---- Export


def serve(folder):
    """What a fresh process with transformers only makes of a folder."""
    status, out, err = outcome(
        fresh_process(SERVER, folder, json.dumps(CONVERSATIONS), PYTHONPATH="")
    )
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def states(model_name, dtype=torch.float64):
    """phi of each of CONVERSATIONS in float64 `[n, d]`, each in a forward pass of its own."""
    backbone, tokenizer = load_reward_model(str(model_name), "cpu", dtype=dtype)
    last = []
    for conversation in CONVERSATIONS:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            last.append(backbone(input_ids=tokens.input_ids).last_hidden_state[0, -1])
    return torch.stack(last)


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("user", [2, None])
def test_an_export_gives_the_personalised_reward_to_transformers_alone(
    request, basis, tmp_path, kind, user
):
    model = request.getfixturevalue(kind)
    V, W = basis
    if user is None:
        export_reward_model(tmp_path / "export", model, V)
        head = V.double()  # (d, K)
    else:
        export_reward_model(tmp_path / "export", model, V, W[user])
        head = (V.double() @ W[user].double())[:, None]  # (d, 1)
    expected = states(model) @ head

    served = serve(tmp_path / "export")
    logits = torch.tensor(served["logits"]).double()
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * scale)
    assert served["dtype"] == "torch.float32"
    assert served["class"] == "LlamaForSequenceClassification"
    assert served["problem_type"] == "regression"
    assert len(served["labels"]) == head.shape[1]
    assert served["pad_token"] == "<|pad|>"
    config_pad_id, tokenizer_pad_id = served["pad_ids"]
    assert config_pad_id == tokenizer_pad_id


def weight_map(folder):
    """The name of each tensor -> the name of its file."""
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_the_backbones_shards_are_linked_except_the_one_that_held_the_old_head(
    sharded, basis, tmp_path
):
    V, _ = basis
    export_reward_model(tmp_path / "export", sharded, V)
    old = weight_map(sharded)
    new = weight_map(tmp_path / "export")
    assert old.keys() == new.keys()
    assert len(set(old.values())) > 2
    for name in old.keys() - {"score.weight"}:
        is_linked = os.path.samefile(sharded / old[name], tmp_path / "export" / new[name])
        assert is_linked == (old[name] != old["score.weight"])
    beside_the_head = [name for name, file in new.items() if file == new["score.weight"]]
    assert beside_the_head == ["score.weight"]

    statuses = [path.stat() for path in (tmp_path / "export").iterdir()]
    modes_of_new_files = {status.st_mode for status in statuses if status.st_nlink == 1}
    assert len(modes_of_new_files) == 1


def test_if_links_fail_the_shards_are_copied(monkeypatch, sharded, basis, tmp_path):
    V, _ = basis
    monkeypatch.setattr(os, "link", refuse)  # as on another disk
    export_reward_model(tmp_path / "export", sharded, V)
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "export").iterdir())


def test_the_card_names_data_rank_seed_and_evidence(single, basis, tmp_path):
    V, _ = basis

    def evidence(alpha, mean):
        interval = {"mean": mean, "low": 0.7, "high": 0.8}
        return {"K": K, "alpha": alpha, "accuracy": {utils.UNSEEN_TEST: interval}}

    run_info = {
        "config": {"data": "the data"},
        "K": K,
        "alpha": 0.5,
        "seed": 17,
        "users": ["a", "b", "c", "d", "e"],
        "verdict": {"text": "Undecided: so far."},
        "evidence": [evidence(alpha=0, mean=0.71), evidence(alpha=0.5, mean=0.75)],
    }
    export_reward_model(tmp_path / "export", single, V, about=run_info)
    card = (tmp_path / "export" / "README.md").read_text()
    for text in (
        "the data",
        "- reward model: single",
        "- rank: 3",
        "- seed: 17",
        "- alpha: 0.5",
        "0.750 [0.700, 0.800]",
        "Undecided: so far.",
    ):
        assert text in card
    assert "0.710" not in card  # the evidence of another alpha


def test_names_are_plain_text_in_the_card(single, basis, tmp_path):
    V, _ = basis
    name = "<img src=x>|a*b_c`\n# d"
    model = shutil.copytree(single, tmp_path / "m_*1*")
    run_info = {"config": {"data": name}, "seed": ["<b>"], "verdict": {"text": "Yes.\n<script>"}}
    export_reward_model(tmp_path / "export", model, V, about=run_info)
    card = (tmp_path / "export" / "README.md").read_text()
    for text in (name, "m_*1*"):
        assert markdown_text(text) in card
    assert "<" not in card
    assert "\n# d" not in card


@pytest.mark.parametrize(
    "evidence",
    [
        5,
        ["a"],
        [{"K": K}],
        [{"K": K, "alpha": 0, "accuracy": None}],
        [{"K": K, "alpha": 0, "accuracy": {utils.UNSEEN_TEST: "<b>"}}],
        [{"K": K, "alpha": 0, "accuracy": {utils.UNSEEN_TEST: {"mean": "<b>", "low": 0}}}],
    ],
    ids=repr,
)
def test_evidence_of_another_shape_is_refused(single, basis, tmp_path, evidence):
    V, _ = basis
    with input_error("about", "results.json"):
        about = {"K": K, "alpha": 0, "evidence": evidence}
        export_reward_model(tmp_path / "export", single, V, about=about)
    assert not (tmp_path / "export").exists()


def test_a_tokenizer_without_a_spare_token_is_refused_with_the_reason(single, basis, tmp_path):
    V, _ = basis
    model = shutil.copytree(single, tmp_path / "model")
    tokens = json.loads((model / "tokenizer.json").read_text())
    tokens["added_tokens"] = [
        token for token in tokens["added_tokens"] if token["content"] != "<|pad|>"
    ]
    (model / "tokenizer.json").write_text(json.dumps(tokens))
    change_json(model / "tokenizer_config.json", pad_token="<|eot_id|>", added_tokens_decoder={})
    if (model / "special_tokens_map.json").exists():
        change_json(model / "special_tokens_map.json", pad_token="<|eot_id|>")
    with input_error("to its tokenizer", "end of a turn"):
        export_reward_model(tmp_path / "export", model, V)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_export_has_the_date_that_embeddings_are_made_with(single, basis, tmp_path, place):
    V, _ = basis
    model = tmp_path / "model"
    shutil.copytree(single, model)
    template = "{{ strftime_now('%d %b %Y') }}" + load_tokenizer(single).chat_template
    (model / "chat_template.jinja").unlink(missing_ok=True)
    change_json(model / "tokenizer_config.json", chat_template=None)
    if place == "chat_template.jinja":
        (model / place).write_text(template)
    else:
        change_json(model / place, chat_template=template)
    try:
        load_tokenizer(model)
    except utils.InputError:  # no template: transformers 4.46 knows no file of templates
        pytest.skip(f"this transformers reads no template from {place}")

    export_reward_model(tmp_path / "export", model, V)
    exported = load_tokenizer(tmp_path / "export")
    text = exported.apply_chat_template([message("user", "Hello")], tokenize=False)
    assert text.startswith("26 Jul 2024")


def test_an_export_of_a_config_that_asks_for_tuples_answers_servers(single, basis, tmp_path):
    V, _ = basis
    model = tmp_path / "model"
    shutil.copytree(single, model)
    change_json(model / "config.json", return_dict=False)
    export_reward_model(tmp_path / "export", model, V)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    assert whole(torch.tensor([[5, 6, 7]])).logits.shape == (1, K)


def test_a_model_with_code_of_its_own_is_refused_with_the_reason(single, basis, tmp_path):
    V, _ = basis
    model = shutil.copytree(single, tmp_path / "model")
    change_json(model / "config.json", auto_map={"AutoModel": "modeling.Own"})
    with input_error("trust_remote_code", "code of its own"):
        export_reward_model(tmp_path / "export", model, V)
    assert not (tmp_path / "export").exists()


def test_an_interrupted_export_leaves_nothing(monkeypatch, single, basis, tmp_path):
    V, _ = basis

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(lore.export, "_prove_export", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_reward_model(tmp_path / "export", single, V)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["head", "pad", "backbone"])
def test_an_export_whose_logits_are_not_the_rewards_is_refused_and_leaves_nothing(
    monkeypatch, single, basis, tmp_path, damage
):
    V, _ = basis
    write_weights = lore.export._write_weights

    def spoil(folder, model_name, head):
        if damage == "head":
            head = 1.001 * head
        write_weights(folder, model_name, head)
        if damage == "pad":  # this token also ends a turn in the middle of a conversation
            change_json(folder / "config.json", pad_token_id=3)
        if damage == "backbone":
            change_json(folder / "config.json", num_hidden_layers=1)

    monkeypatch.setattr(lore.export, "_write_weights", spoil)
    with input_error("nothing was written"):
        export_reward_model(tmp_path / "export", single, V)
    assert not list(tmp_path.iterdir())


def test_bases_and_folders_that_do_not_fit_are_refused(single, basis, tmp_path):
    V, W = basis
    with input_error("V: shape"):
        export_reward_model(tmp_path / "export", single, V[1:])
    with input_error("w: shape"):
        export_reward_model(tmp_path / "export", single, V, W[0, 1:])
    with input_error("not empty"):
        export_reward_model(single, single, V)
    (tmp_path / "file").write_text("")
    with input_error("a file, or not empty"):
        export_reward_model(tmp_path / "file", single, V)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_number_format_changes_nothing(
    default_dtype, single, basis, tmp_path, default
):
    V, W = basis
    prompts = ["Where do we eat?", "And then?"]
    completions = ["At the pier.", "We walk home along the canal."]

    def results(folder):
        export_reward_model(folder, single, V, W[1])
        reward = personal_reward(single, V, W, "cpu")
        return reward(prompts, completions, [1, 2]), weights_in(folder)

    rewards, exported = results(tmp_path / "float32")
    default_dtype(default)
    rewards_now, exported_now = results(tmp_path / "other")
    assert rewards_now == pytest.approx(rewards, rel=1e-5)
    assert exported_now.keys() == exported.keys()
    for name, tensor in exported.items():
        assert exported_now[name].dtype == torch.float32
        assert torch.equal(exported_now[name], tensor)


@pytest.fixture
def default_dtype():
    """`torch.set_default_dtype` for one test."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def weights_in(folder):
    """All tensors of a folder's safetensors files."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_tensors(path)[0]
    return tensors


# ---- Architectures


FURTHER_ARCHITECTURES = {
    "GPTJ": dict(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=512, rotary_dim=8),
}


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory):
    """The files of a tokenizer that has no more tokens than ARCHITECTURES have embeddings."""
    folder = tmp_path_factory.mktemp("tokenizer")
    lore.standin.build_standin_model(folder, [""], hidden_size=8, layers=1)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    return folder


@pytest.mark.parametrize("name", [*ARCHITECTURES, *FURTHER_ARCHITECTURES])
def test_every_architecture_exports_or_says_why_not(name, small_vocabulary, tmp_path):
    """Held against the original, in float32, with the new head put in by hand."""
    settings = FURTHER_ARCHITECTURES.get(name) or ARCHITECTURES[name][0]
    folder = save_random_model(tmp_path / "model", name, settings)
    shutil.copytree(small_vocabulary, folder, dirs_exist_ok=True)
    V = planted_basis(len(load_reward_head(folder)), 2)
    try:
        export_reward_model(tmp_path / "export", folder, V)
    except utils.InputError as reason:
        assert len(str(reason).splitlines()) == 1
        assert "nothing was written" in str(reason)
        assert not (tmp_path / "export").exists()
        return

    original = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    original.score.weight = torch.nn.Parameter(V.T.contiguous())
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    tokenizer = load_tokenizer(folder)
    text = tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = original(input_ids=ids).logits
        logits = exported(input_ids=ids).logits
    assert expected.norm() > 0
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "name", [name for name in ARCHITECTURES if name.startswith(("Llama", "GPT2", "OPT", "Gemma3"))]
)
def test_a_reward_fits_models_whose_states_have_another_width_than_their_config(
    name, small_vocabulary, tmp_path
):
    folder = save_random_model(tmp_path / "model", name, ARCHITECTURES[name][0])
    shutil.copytree(small_vocabulary, folder, dirs_exist_ok=True)
    d = len(load_reward_head(folder))
    reward = personal_reward(folder, planted_basis(d, 2), {"ada": [0.5, 0.5]}, "cpu")
    assert math.isfinite(reward(["One?"], ["Two."], ["ada"])[0])
    with input_error("V: shape"):
        personal_reward(folder, planted_basis(d + 1, 2), {"ada": [0.5, 0.5]}, "cpu")


def test_a_model_without_a_classifier_in_transformers_is_refused_with_the_reason(
    single, basis, tmp_path
):
    V, _ = basis
    model = shutil.copytree(single, tmp_path / "model")
    for model_type in ("mamba2", "nobody's", ["llama"]):
        change_json(model / "config.json", model_type=model_type)
        with input_error("no sequence classifier", repr(str(model_type))):
            export_reward_model(tmp_path / "export", model, V)
    assert not (tmp_path / "export").exists()


# ---- A basis and its model


def is_used_by_export(folder, model, V, **options):
    export_reward_model(folder, model, V, [1.0, 0.0, 0.0], **options)


def is_used_by_reward(folder, model, V, **options):
    personal_reward(model, V, {"ada": [1.0, 0.0, 0.0]}, "cpu", **options)


BOTH_USES = pytest.mark.parametrize("use", [is_used_by_export, is_used_by_reward])


def run_info_of(model, **changes):
    """What a training records of a basis, as far as it matters here."""
    digest = digest_of(load_reward_head(model).tolist())
    run_info = {
        "K": K,
        "alpha": 0.0,
        "config": {"model": "the model", "data": "the data"},
        "identity": {"reward_head": digest, **model_identity(model)},
    }
    return run_info | changes


@pytest.fixture
def basis_file(single, basis, tmp_path):
    V, W = basis
    save_tensors(tmp_path / "K_3.safetensors", {"V": V, "W": W}, **run_info_of(single))
    return tmp_path / "K_3.safetensors"


@BOTH_USES
@pytest.mark.parametrize(
    "other", [{"identity": {"reward_head": "another's"}}, {"K": K - 1}], ids=["model", "rank"]
)
def test_a_basis_of_another_model_or_a_lower_rank_is_refused(single, basis, tmp_path, use, other):
    V, _ = basis
    with input_error("this basis"):
        use(tmp_path / "export", single, V, about=run_info_of(single, **other))
    file = tmp_path / "K_3.safetensors"
    save_tensors(file, {"V": V}, **run_info_of(single, **other))
    with input_error("this basis"):
        use(tmp_path / "export", single, file)
    assert not (tmp_path / "export").exists()


def test_the_reference_is_used_as_a_basis_of_one_column(single, tmp_path):
    file = tmp_path / "K_0.safetensors"
    head = load_reward_head(single)
    save_tensors(file, {"V": head}, **run_info_of(single, K=0))
    export_reward_model(tmp_path / "export", single, file)
    assert torch.equal(load_reward_head(tmp_path / "export"), head)
    personal_reward(single, file, {"ada": [1.0]}, device="cpu")


@BOTH_USES
def test_a_model_with_another_head_is_another_model(single, basis_file, tmp_path, use):
    other = shutil.copytree(single, tmp_path / "other")
    tensors = load_tensors(other / "model.safetensors")[0]
    tensors["score.weight"] = 2 * tensors["score.weight"]
    lore.export._save_shard(other / "model.safetensors", tensors)
    with input_error("another model", str(other), "'the model'"):
        use(tmp_path / "export", other, basis_file)


def save_with(folder, model, change):
    """A copy of a model in `folder`, with what `change(name, tensor)` returns as its tensors."""
    shutil.copytree(model, folder)
    tensors = load_tensors(folder / "model.safetensors")[0]
    changed = {name: change(name, tensor) for name, tensor in tensors.items()}
    lore.export._save_shard(folder / "model.safetensors", changed)
    return folder


@BOTH_USES
@pytest.mark.parametrize("trained", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_model_that_was_trained_further_with_its_head_frozen_is_another_model(
    single, basis_file, tmp_path, use, trained
):
    def train(name, tensor):
        return tensor * 1.01 if name == trained else tensor

    other = save_with(tmp_path / "other", single, train)
    assert torch.equal(load_reward_head(other), load_reward_head(single))
    with input_error("another model", str(other), "'the model'", "weights below"):
        use(tmp_path / "export", other, basis_file)
    assert not (tmp_path / "export").exists()


@BOTH_USES
def test_the_same_weights_in_other_files_and_a_wider_format_are_the_same_model(
    single, sharded, basis, tmp_path, use
):
    V, _ = basis
    use(tmp_path / "1", sharded, V, about=run_info_of(single))
    narrow = save_with(tmp_path / "narrow", single, lambda name, tensor: tensor.bfloat16())
    wide = save_with(tmp_path / "wide", narrow, lambda name, tensor: tensor.float())
    use(tmp_path / "2", wide, V, about=run_info_of(narrow))
    with input_error("another model"):
        use(tmp_path / "3", single, V, about=run_info_of(narrow))


@BOTH_USES
def test_a_basis_of_an_earlier_version_is_compared_by_its_reward_head(single, basis, tmp_path, use):
    V, _ = basis
    identity = {"reward_head": run_info_of(single)["identity"]["reward_head"]}
    use(tmp_path / "1", single, V, about=run_info_of(single, identity=identity))


@BOTH_USES
def test_a_basis_whose_model_is_not_known_is_used_with_a_note(
    capsys, single, basis, basis_file, tmp_path, use
):
    V, _ = basis
    use(tmp_path / "1", single, V)
    (note,) = capsys.readouterr().out.splitlines()
    assert note.startswith("note: ")
    assert "results/K_<rank>.safetensors" in note
    use(tmp_path / "2", single, V, about={"config": {"data": "the data"}})
    assert capsys.readouterr().out.startswith("note: ")

    use(tmp_path / "3", single, V, about=run_info_of(single))
    use(tmp_path / "4", single, basis_file)
    use(tmp_path / "5", single, str(basis_file), about={"verdict": {"text": "Yes."}})
    assert capsys.readouterr().out == ""


def test_a_file_of_a_basis_is_the_basis_and_what_is_known_of_it(
    single, basis, basis_file, tmp_path
):
    V, W = basis
    of_file = personal_reward(single, basis_file, W, "cpu")
    of_tensor = personal_reward(single, V, W, "cpu")
    expected = of_tensor(["One?"], ["Two."], [1])
    assert of_file(["One?"], ["Two."], [1]) == pytest.approx(expected, rel=1e-5)

    export_reward_model(tmp_path / "1", single, basis_file, W[0], {"verdict": {"text": "Yes."}})
    export_reward_model(tmp_path / "2", single, V, W[0])
    exported = weights_in(tmp_path / "1")
    for name, tensor in weights_in(tmp_path / "2").items():
        assert torch.equal(exported[name], tensor)
    card = (tmp_path / "1" / "README.md").read_text()
    for text in ("the data", "- rank: 3", "Yes."):
        assert text in card


@BOTH_USES
def test_a_file_without_a_basis_is_refused(single, basis, tmp_path, use):
    V, _ = basis
    with input_error("missing.safetensors"):
        use(tmp_path / "export", single, tmp_path / "missing.safetensors")
    save_tensors(tmp_path / "weights.safetensors", {"W": V})
    with input_error("weights.safetensors", "no basis in it"):
        use(tmp_path / "export", single, tmp_path / "weights.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    with input_error("damaged.safetensors"):
        use(tmp_path / "export", single, tmp_path / "damaged.safetensors")
    assert not (tmp_path / "export").exists()


@BOTH_USES
@pytest.mark.parametrize(
    "about",
    [["a"], "a", {"identity": ["a"]}, {"config": "a"}, {"K": "3"}, {"K": [3]}],
    ids=str,
)
def test_what_is_known_of_a_basis_in_another_shape_is_refused(single, basis, tmp_path, use, about):
    V, _ = basis
    with input_error("about", "results.json"):
        use(tmp_path / "export", single, V, about=about)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    "about",
    [
        {"evidence": 7},
        {"evidence": [7]},
        {"evidence": [{"K": K}]},
        {"evidence": [{"K": K, "alpha": None, "accuracy": {}}]},
        {"verdict": "yes"},
        {"verdict": {}},
        {"verdict": [["text"]]},
    ],
    ids=str,
)
def test_evidence_in_another_shape_is_refused(single, basis, tmp_path, about):
    V, _ = basis
    with input_error("about", "results.json"):
        export_reward_model(tmp_path / "export", single, V, about=about)
    assert not (tmp_path / "export").exists()


# ---- A reward for trainers


def test_a_personal_reward_scores_every_completion_for_its_user(monkeypatch, single, basis):
    V, W = basis
    embed = lore.embedding.embed_conversations
    options_given = []

    def listen(*arguments, **options):
        options_given.append(options)
        return embed(*arguments, **options)

    monkeypatch.setattr(lore.rewards, "embed_conversations", listen)
    reward = personal_reward(single, V, {"ada": W[0], 7: W[1].tolist()}, token_budget=64)
    assert reward.__name__ == "personal_reward"
    prompts = ["One?", "One?", "Two?"]
    completions = ["yes", "no", "it is so"]
    users = ["ada", 7, "ada"]
    scores = reward(prompts, completions, user=users, prompt_id=[1, 2, 3])
    assert options_given == [{"token_budget": 64}]

    backbone, tokenizer = load_reward_model(str(single), "cpu")
    true_weights = {"ada": W[0].double(), 7: W[1].double()}
    conversations = []
    for prompt, completion in zip(prompts, completions, strict=True):
        conversations.append([message("user", prompt), message("assistant", completion)])
    for conversation, user, score in zip(conversations, users, scores, strict=True):
        phi = state_alone(backbone, tokenizer, conversation).double()
        assert isinstance(score, float)
        expected = float(phi @ V.double() @ true_weights[user])
        assert score == pytest.approx(expected, rel=1e-4, abs=1e-3)

    as_lists_of_messages = reward(
        [conversation[:1] for conversation in conversations],
        [conversation[1:] for conversation in conversations],
        users,
    )
    assert scores == pytest.approx(as_lists_of_messages)


def test_users_of_a_matrix_of_weights_are_its_row_numbers(single, basis):
    V, W = basis
    by_row = personal_reward(single, V, W, "cpu")
    by_name = personal_reward(single, V, {"ada": W[2]}, "cpu")
    assert by_row(["One?"], ["yes"], [2]) == by_name(["One?"], ["yes"], ["ada"])


def test_each_process_of_a_trainer_scores_its_own_completions(monkeypatch, single, basis):
    V, W = basis
    reward = personal_reward(single, V, {"ada": W[0]}, "cpu")
    alone = reward(["One?"], ["yes"], ["ada"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert reward(["One?"], ["yes"], ["ada"]) == alone
    assert os.environ["RANK"] == "1"


def test_weights_that_are_no_simplex_are_exported_and_rewarded_as_they_are(single, basis, tmp_path):
    V, _ = basis
    w = torch.tensor([-1.5, 0.25, 2.0])
    expected = states(single) @ V.double() @ w.double()

    export_reward_model(tmp_path / "export", single, V, w)
    head = weights_in(tmp_path / "export")["score.weight"][0].double()
    torch.testing.assert_close(states(single) @ head, expected, rtol=1e-4, atol=1e-3)

    reward = personal_reward(single, V, {"ada": w}, "cpu")
    prompts = [conversation[:-1] for conversation in CONVERSATIONS]
    completions = [conversation[-1:] for conversation in CONVERSATIONS]
    scores = reward(prompts, completions, ["ada"] * 3)
    assert scores == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-3)


def test_best_of_n_gives_scores_and_their_order():
    def length_for_ada(prompts, completions, user):
        assert prompts == ["One?"] * 3
        assert user == ["ada"] * 3
        return [len(completion) for completion in completions]

    scores, order = best_of_n(length_for_ada, "One?", ["yes", "indeed", "no"], "ada")
    assert scores == [3, 6, 2]
    assert order == [1, 0, 2]


def test_rewards_refuse_what_does_not_fit_together(single, basis):
    V, W = basis
    reward = personal_reward(single, V, {"ada": W[0]})
    for prompts, completions, users in (
        (["a"], ["b", "c"], ["ada"]),
        (["a", "b"], ["c"], ["ada"]),
        (["a"], ["b"], ["ada", "ada"]),
    ):
        with input_error("equally many"):
            reward(prompts, completions, user=users)
    with input_error("user 'eve'", "fit_new_user"):
        reward(["a", "b", "c"], ["d", "e", "f"], user=["ada", "eve", 7])
    with input_error("neither a text nor"):
        best_of_n(reward, "a", [None], "ada")
    with input_error("column user"):
        reward(["a"], ["b"])
    for nothing in ([], ()):
        with input_error("no conversations"):
            best_of_n(reward, "a", nothing, "ada")
    with input_error("weights of ada"):
        personal_reward(single, V, {"ada": "abc"}, "cpu")


def test_one_text_is_no_list_of_texts(single, basis):
    """Its letters would be scored."""
    V, W = basis
    reward = personal_reward(single, V, {"a": W[0]}, "cpu")
    with input_error("completions = 'yes'", "give a list"):
        best_of_n(reward, "One?", "yes", "a")
    for prompts, completions, users in (
        ("One", ["a", "b", "c"], ["a", "a", "a"]),
        (["One?"] * 3, "yes", ["a", "a", "a"]),
        (["One?"] * 3, ["a", "b", "c"], "aaa"),
    ):
        with input_error("one text", "give a list"):
            reward(prompts, completions, users)
    scores, order = best_of_n(reward, "One?", ("yes", "no"), "a")  # any other sequence is fine
    assert sorted(order) == [0, 1]


# ---- A group that chooses together


def group_reward(rewards_of_user):
    """A reward function for given rewards, {user: {completion: reward}}."""

    def reward(prompts, completions, user):
        assert prompts == ["Lunch?"] * len(completions)
        return [rewards_of_user[name][text] for name, text in zip(user, completions, strict=True)]

    return reward


LUNCH = ["soup", "fish", "salad"]
GUESTS = group_reward(
    {
        "ada": {"soup": 300.0, "fish": 200.0, "salad": 0.0},
        "ben": {"soup": 300.0, "fish": 200.0, "salad": 0.0},
        "eve": {"soup": -1000.0, "fish": -850.0, "salad": -800.0},
    }
)


@pytest.mark.parametrize(
    ("rule", "scores", "order"),
    [
        # (300 + 300 - 1000) / 3, (200 + 200 - 850) / 3, -800 / 3
        ("mean", [-400 / 3, -150, -800 / 3], [0, 1, 2]),
        # ada and ben: soup beats 2, fish 1, salad 0; eve: 0, 1, 2
        ("borda", [4 / 3, 1, 2 / 3], [0, 1, 2]),
        # soup costs eve 200, fish ada and ben 100 (and eve 50), salad ada and ben 300
        ("worst_served", [-200, -100, -300], [1, 0, 2]),
    ],
)
def test_a_group_chooses_by_the_rule_that_is_named(rule, scores, order):
    found = rewards_of_group(GUESTS, LUNCH, "Lunch?", ["ada", "ben", "eve"], rule)
    assert found == (pytest.approx(scores), order)


def test_the_rules_differ_where_one_user_feels_strongly():
    """Two prefer soup by little, one prefers fish by much."""
    small = {"soup": 10.0, "fish": 0.0}
    reward = group_reward({1: small, 2: small, 3: {"soup": 0.0, "fish": 90.0}})
    first = {
        rule: rewards_of_group(reward, ["soup", "fish"], "Lunch?", [1, 2, 3], rule)[1][0]
        for rule in ("mean", "borda", "worst_served")
    }
    assert first == {"mean": 1, "borda": 0, "worst_served": 1}


@pytest.mark.parametrize("rule", ["mean", "borda", "worst_served"])
def test_a_constant_that_is_added_to_one_users_rewards_changes_no_order(rule):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        table = torch.randint(-300, 300, (3, 4), generator=generator).tolist()
        completions = ["a", "b", "c", "d"]
        users = {user: dict(zip(completions, row)) for user, row in enumerate(table)}
        order = rewards_of_group(group_reward(users), completions, "Lunch?", [0, 1, 2], rule)[1]
        users[1] = {text: reward + 4096 for text, reward in users[1].items()}
        shifted = rewards_of_group(group_reward(users), completions, "Lunch?", [0, 1, 2], rule)[1]
        assert shifted == order


def test_ties_share_the_points_and_keep_the_order_of_the_completions():
    likes = {"soup": 5.0, "fish": 7.0, "salad": 5.0, "rice": 7.0}
    reward = group_reward({"ada": likes, "ben": likes})
    scores, order = rewards_of_group(reward, list(likes), "Lunch?", ["ada", "ben"], "borda")
    assert scores == [0.5, 2.5, 0.5, 2.5]  # of two others or more, each half of the tie
    assert order == [1, 3, 0, 2]


def test_a_group_of_one_chooses_as_the_user_alone():
    scores, order = best_of_n(GUESTS, "Lunch?", LUNCH, "eve")
    assert rewards_of_group(GUESTS, LUNCH, "Lunch?", ["eve"], "mean") == (scores, order)
    assert rewards_of_group(GUESTS, LUNCH, "Lunch?", ["eve"], "borda") == ([0, 1, 2], order)
    expected = ([-200, -50, 0], order)
    assert rewards_of_group(GUESTS, LUNCH, "Lunch?", ["eve"], "worst_served") == expected


def test_a_user_who_is_named_twice_has_two_votes():
    users = ["ada", "eve", "eve", "eve"]
    assert rewards_of_group(GUESTS, LUNCH, "Lunch?", users, "borda")[1] == [2, 1, 0]


def test_a_group_takes_the_rewards_of_personal_reward(single, basis):
    V, W = basis
    reward = personal_reward(single, V, {1: W[0], "ben": -W[1]}, "cpu")
    completions = ["yes", "no", "it is so"]
    scores, order = rewards_of_group(reward, tuple(completions), "One?", ["1", "ben"], "mean")
    alone = [best_of_n(reward, "One?", completions, user)[0] for user in (1, "ben")]
    assert scores == pytest.approx(np.mean(alone, axis=0).tolist(), rel=1e-5)
    assert order == np.argsort(scores)[::-1].tolist()


def test_a_group_that_cannot_choose_is_refused_with_the_reason(single, basis):
    V, W = basis
    reward = personal_reward(single, V, {"ada": W[0]}, "cpu")
    with input_error("rule = 'median'", "mean, borda, worst_served"):
        rewards_of_group(reward, ["yes"], "One?", ["ada"], "median")
    with input_error("users: none"):
        rewards_of_group(reward, ["yes"], "One?", [], "mean")
    with input_error("user 'eve'", "fit_new_user"):
        rewards_of_group(reward, ["yes"], "One?", ["ada", "eve"], "mean")
    with input_error("users = 'ada'", "give a list"):
        rewards_of_group(reward, ["yes"], "One?", "ada", "mean")
    with input_error("completions = 'One?'", "give a list"):  # as in the order of best_of_n
        rewards_of_group(reward, "One?", ["yes"], ["ada"], "mean")
    with input_error("no conversations"):
        rewards_of_group(reward, [], "One?", ["ada"], "mean")


# ---- Ids of users


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("known", "asked"),
    [
        (1, "1"),
        ("1", 1),
        ("1", 1.0),
        (1, "1.0"),
        ("1.0", 1),
        (np.int64(1), "1"),
        ("1", np.float64(1)),
        (np.str_("ada"), "ada"),
        ("ada", " ada\n"),
        (COMPOSED, DECOMPOSED),
        (("ada", 1), ("ada", 1)),
    ],
    ids=repr,
)
def test_ids_that_read_the_same_are_one_user(single, basis, known, asked):
    V, W = basis
    reward = personal_reward(single, V, {"another": W[0], known: W[1]}, "cpu")
    expected = reward(["One?"], ["yes"], [known])
    assert reward(["One?"], ["yes"], [asked]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "names", [(1, "1"), ("1.0", 1), ("ada", " ada"), (COMPOSED, DECOMPOSED)], ids=repr
)
def test_two_users_whose_ids_read_the_same_are_refused(single, basis, names):
    V, W = basis
    with input_error("two users are called"):
        personal_reward(single, V, dict(zip(names, W)), "cpu")


@pytest.mark.parametrize("user", ["11", 2, "1.5", "01", -1, True, 1.5, (1,)], ids=repr)
def test_ids_that_read_otherwise_are_other_users(single, basis, user):
    V, W = basis
    reward = personal_reward(single, V, {1: W[0]}, "cpu")
    with input_error("no weights", "fit_new_user"):
        reward(["One?"], ["yes"], [user])


@pytest.mark.parametrize("user", [None, math.nan, 2.0**53, -1e300, "1e+16", [1], {}], ids=repr)
def test_what_several_users_may_have_become_is_no_id(single, basis, user):
    V, W = basis
    reward = personal_reward(single, V, {1: W[0]}, "cpu")
    with input_error(f"user {user!r}: "):
        reward(["One?"], ["yes"], [user])
    if not isinstance(user, list | dict):
        with input_error(f"user {user!r}: "):
            personal_reward(single, V, {user: W[0]}, "cpu")


def test_trl_trains_with_the_callable_and_with_an_exported_folder(single, basis, tmp_path):
    trl = pytest.importorskip("trl")  # tests/trl-requirements.txt
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    V, W = basis
    export_reward_model(tmp_path / "export", single, V, W[0])
    reward = personal_reward(single, V, {"ada": W[0], "ben": W[1]})
    calls = []  # (users, scores) of each step

    def listening(prompts, completions, **columns):
        scores = reward(prompts, completions, **columns)
        calls.append((columns["user"], scores))
        return scores

    tokenizer = AutoTokenizer.from_pretrained(single, padding_side="left")
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rows = [{"prompt": [message("user", "Shall we?")], "user": user} for user in ("ada", "ben") * 4]
    trainer = trl.GRPOTrainer(
        model=policy,
        processing_class=tokenizer,
        reward_funcs=[reward, listening, str(tmp_path / "export")],
        train_dataset=Dataset.from_list(rows),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            bf16=False,
        ),
    )
    trainer.train()
    logged_means = [
        entry["rewards/personal_reward/mean"]
        for entry in trainer.state.log_history
        if "rewards/personal_reward/mean" in entry
    ]
    assert len(logged_means) == 2
    assert len(calls) == 2
    for logged_mean, (_, scores) in zip(logged_means, calls):
        assert logged_mean == pytest.approx(sum(scores) / len(scores), rel=1e-4)
    assert {user for users, _ in calls for user in users} == {"ada", "ben"}
