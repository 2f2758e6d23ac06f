"""What is in a checkpoint: each folder ends in the right model, or in one line with the remedy."""

import json
import os
import shutil

import pytest
import torch
from demos import state_alone
from helpers import input_error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import lore.checkpoint
import lore.reward_model
import utils
from lore.checkpoint import WEIGHTS, inspect_checkpoint
from lore.embedding import embed_conversations
from lore.export import export_reward_model
from lore.files import ARCHIVES
from lore.reward_model import (
    load_released_reference,
    load_reward_head,
    load_reward_model,
    load_tokenizer,
    model_identity,
)
from lore.standin import build_standin_model

pytestmark = pytest.mark.usefixtures("one_thread")

D = 16
CONVERSATION = [
    {"role": "user", "content": "Where do we eat?"},
    {"role": "assistant", "content": "At the pier."},
]
LFS_POINTER = (
    f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 16060522240\n"
)
DEEP_JSON = "[" * 100_000 + "]" * 100_000
UP_PROJECTION = "model.layers.0.mlp.up_proj.weight"
MERGE = "`model.merge_and_unload()`"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A reward model in one safetensors file."""
    folder = tmp_path_factory.mktemp("models") / "single"
    build_standin_model(folder, [""], hidden_size=D, layers=1, heads=2, key_value_heads=1)
    return folder


@pytest.fixture
def folder(model, tmp_path):
    """A copy of the model, to be changed."""
    return shutil.copytree(model, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


# ---- What a test does to a folder


def change_json(path, **values):
    """Replace entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tensors_of(folder):
    """The weights of a model in one file, in memory of their own: the file may be replaced."""
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def save_single(folder, tensors):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def other_tensors(folder):
    """Weights of another training of the same architecture."""
    return {name: 1.5 * tensor for name, tensor in tensors_of(folder).items()}


def save_shards(folder, tensors, index="model.safetensors.index.json"):
    """Write weights as `save_pretrained` writes large ones: two shards and their index."""
    names = sorted(tensors)
    files = {"model-00001-of-00002": names[::2], "model-00002-of-00002": names[1::2]}
    weight_map = {}
    for stem, part in files.items():
        shard = {name: tensors[name] for name in part}
        if index.startswith("pytorch_model"):
            file = stem.replace("model", "pytorch_model") + ".bin"
            torch.save(shard, folder / file)
        else:
            file = f"{stem}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def add_to_shard(path, name):
    """Write a weight of another training into a shard."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    save_file(tensors | {name: torch.ones(2 * D, D)}, path, {"format": "pt"})


def remove_shards(folder):
    for path in folder.glob("*-of-0000*"):
        path.unlink()


def save_adapter(folder, base="some/base", weights="adapter_model.safetensors", head=False):
    """The files of a LoRA adapter, as peft writes them."""
    prefix = "base_model.model"
    tensors = {f"{prefix}.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, D)}
    if head:  # trained with modules_to_save
        tensors[f"{prefix}.score.weight"] = torch.ones(1, D)
    if weights.endswith(".bin"):
        torch.save(tensors, folder / weights)
    else:
        save_file(tensors, folder / weights, {"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def make_adapter_alone(folder, **options):
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    save_adapter(folder, **options)


# ---- Claims about a folder


def calls(folder, tmp_path):
    """Everything that looks at a checkpoint, as functions without arguments."""
    return {
        "head": lambda: load_reward_head(folder),
        "model": lambda: load_reward_model(folder, "cpu"),
        "identity": lambda: model_identity(folder),
        "export": lambda: export_reward_model(tmp_path / "export", folder, torch.ones(D, 2)),
    }


def check_refused(folder, tmp_path, *named, by=("head", "model", "identity", "export")):
    """Each call raises one line with the folder and the right remedy, and writes nothing."""
    shutil.rmtree(tmp_path / "export", ignore_errors=True)  # of an earlier check_taken
    for name in by:
        with input_error(str(folder), *named) as message:
            calls(folder, tmp_path)[name]()
        assert "network" not in message()
        assert "check the name" not in message()
        assert message().isprintable()
    assert not (tmp_path / "export").exists()


def check_taken(folder, expected, tokenizer, tmp_path):
    """All calls take the weights `expected` (name -> tensor), whatever else lies in the folder."""
    head = expected["score.weight"].T
    assert torch.equal(load_reward_head(folder), head)
    backbone, _ = load_reward_model(folder, "cpu")
    assert torch.equal(backbone.norm.weight, expected["model.norm.weight"])
    ((_, head_of_scorer),) = backbone.reward_scorer
    assert torch.equal(head_of_scorer, head)

    V = torch.randn(D, 2, generator=torch.Generator().manual_seed(0))
    export_reward_model(tmp_path / "export", folder, V)
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = exported(input_ids=ids).logits[0]
    rewards = state_alone(backbone, tokenizer, CONVERSATION) @ V
    torch.testing.assert_close(logits, rewards, rtol=1e-4, atol=1e-4)


# ---- Which files are read


@pytest.mark.parametrize("present", range(1, 16))
def test_the_files_that_are_inspected_are_those_that_from_pretrained_reads(
    folder, tokenizer, present
):
    """Of every subset of the four kinds of weights, each of another training."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    kinds = [kind for k, kind in enumerate(WEIGHTS) if present >> k & 1]
    norm = "model.norm.weight"
    for kind in kinds:
        marked = {**tensors, norm: torch.full((D,), 2.0 + WEIGHTS.index(kind))}
        if kind.endswith("index.json"):
            save_shards(folder, marked, kind)
            if kind == WEIGHTS[1] and WEIGHTS[0] in kinds:  # or it would be a mixture
                for path in folder.glob("model-*"):
                    path.unlink()
        elif kind.endswith(".bin"):
            torch.save(marked, folder / kind)
        else:
            save_single(folder, marked)

    files = inspect_checkpoint(folder).weight_files
    if len(files) == 1:
        kind_read = files[0]
    elif files[0].endswith(".bin"):
        kind_read = "pytorch_model.bin.index.json"
    else:
        kind_read = "model.safetensors.index.json"
    read = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert read.model.norm.weight[0] == 2.0 + WEIGHTS.index(kind_read)
    backbone, _ = load_reward_model(folder, "cpu", tokenizer=tokenizer)
    assert torch.equal(backbone.norm.weight, read.model.norm.weight)


INDEX = "model.safetensors.index.json"
LEFTOVERS = {
    "an index whose shards are gone": lambda f: (
        save_shards(f, other_tensors(f)),
        remove_shards(f),
    ),
    "an index, one of whose shards is gone": lambda f: (
        save_shards(f, other_tensors(f)),
        (f / "model-00002-of-00002.safetensors").unlink(),
    ),
    "an index of damaged shards": lambda f: (
        save_shards(f, other_tensors(f)),
        (f / "model-00002-of-00002.safetensors").write_bytes(b"damaged"),
    ),
    "shards of the same weights": lambda f: save_shards(f, tensors_of(f)),
    "an index that is a list": lambda f: (f / INDEX).write_text("[]"),
    "an index that is no JSON": lambda f: (f / INDEX).write_text("{"),
    "an index that is nested deeply": lambda f: (f / INDEX).write_text(DEEP_JSON),
    "a .bin file of another save": lambda f: torch.save(other_tensors(f), f / WEIGHTS[2]),
    "shards of .bin files": lambda f: save_shards(f, other_tensors(f), WEIGHTS[3]),
    "a variant": lambda f: save_file(other_tensors(f), f / "model.fp16.safetensors"),
    "the authors' own format": lambda f: save_file(
        other_tensors(f), f / "consolidated.safetensors"
    ),
    "the authors' own format, in a folder": lambda f: (
        (f / "original").mkdir(),
        (f / "original" / "consolidated.00.pth").write_bytes(b"other"),
        (f / "original" / "params.json").write_text("{}"),
    ),
    "a GGUF file": lambda f: (f / "model-q4.gguf").write_bytes(b"GGUF"),
    "a trainer's state": lambda f: (
        (f / "training_args.bin").write_bytes(b"state"),
        (f / "optimizer.pt").write_bytes(b"state"),
        (f / "trainer_state.json").write_text("{}"),
    ),
    "checkpoints of a trainer": lambda f: shutil.copytree(f, f / "checkpoint-500"),
    "an adapter's weights without its config": lambda f: save_file(
        {"base_model.model.score.weight": torch.ones(1, D)}, f / "adapter_model.safetensors"
    ),
    "a .bin file that is a pointer of git-lfs": lambda f: (f / WEIGHTS[2]).write_text(LFS_POINTER),
}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_from_pretrained_leaves_alone_changes_nothing(
    model, folder, tokenizer, tmp_path, name
):
    LEFTOVERS[name](folder)
    check_taken(folder, tensors_of(model), tokenizer, tmp_path)
    assert model_identity(folder) == model_identity(model)


def test_shards_are_taken_and_have_an_identity_of_their_own(model, folder, tokenizer, tmp_path):
    save_shards(folder, tensors_of(folder))
    (folder / "model.safetensors").unlink()
    check_taken(folder, tensors_of(model), tokenizer, tmp_path)
    identity = model_identity(folder)
    save_shards(folder, other_tensors(model))
    assert model_identity(folder)["weights"] != identity["weights"]
    assert model_identity(folder)["tokenizer"] == identity["tokenizer"]


def test_a_model_whose_weights_are_in_a_bin_file_is_loaded_and_known_by_them(folder, tmp_path):
    tensors = tensors_of(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    backbone, _ = load_reward_model(folder, "cpu")
    assert torch.equal(backbone.norm.weight, tensors["model.norm.weight"])
    identity = model_identity(folder)
    torch.save({**tensors, "model.norm.weight": torch.ones(D) / 2}, folder / "pytorch_model.bin")
    assert model_identity(folder)["weights"] != identity["weights"]
    check_refused(folder, tmp_path, "pytorch_model.bin", "safetensors", by=["head", "export"])


def test_two_saves_that_differ_are_refused_as_the_one_that_is_read_may_be_the_old_one(
    folder, tmp_path
):
    save_shards(folder, other_tensors(folder))  # as save_pretrained does after another save
    check_refused(folder, tmp_path, "two different models", INDEX, "remove the older one")


def test_two_saves_that_differ_in_one_layer_are_told_apart(folder, tmp_path):
    tensors = tensors_of(folder)
    tensors[UP_PROJECTION][0, 3] += 1
    save_shards(folder, tensors)
    check_refused(folder, tmp_path, "two different models")


def test_links_and_the_hubs_cache_are_followed(model, tokenizer, tmp_path):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--some--model" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    (tmp_path / "link").symlink_to(snapshot)
    check_taken(snapshot, tensors_of(model), tokenizer, tmp_path)
    assert torch.equal(load_reward_head(tmp_path / "link"), load_reward_head(model))
    check_refused(snapshot.parents[1], tmp_path, "snapshots", "give that one")
    (blobs / "not there").unlink(missing_ok=True)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(blobs / "not there")
    check_refused(snapshot, tmp_path, "model.safetensors", "link", "download it again")


# ---- What cannot be used


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def replace_weights(name, content=b"other weights"):
    """A change of a folder: a file of this name instead of model.safetensors."""

    def change(folder):
        remove_weights(folder)
        (folder / name).write_bytes(content)

    return change


def write_index(content):
    """A change of a folder: an index with this content instead of model.safetensors."""

    def change(folder):
        remove_weights(folder)
        (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))

    return change


def write(name, content):
    """A change of a folder: the content of one file."""
    return lambda folder: (folder / name).write_text(content)


REFUSED = {  # what is done to a whole model, and words of the remedy
    "an adapter alone": (make_adapter_alone, ["adapter", "some/base", MERGE]),
    "an adapter with a head": (
        lambda f: make_adapter_alone(f, head=True),
        ["adapter", "some/base", MERGE],
    ),
    "an adapter in a .bin file": (
        lambda f: make_adapter_alone(f, weights="adapter_model.bin"),
        ["adapter", "some/base", MERGE],
    ),
    "an adapter beside the base's config": (
        lambda f: (remove_weights(f), save_adapter(f)),
        ["adapter", "some/base", MERGE],
    ),
    "an adapter's config alone": (
        lambda f: (make_adapter_alone(f), (f / "adapter_model.safetensors").unlink()),
        ["adapter", "some/base", MERGE],
    ),
    "an adapter's weights alone": (
        lambda f: (make_adapter_alone(f), (f / "adapter_config.json").unlink()),
        ["adapter", MERGE],
    ),
    "an adapter whose base has a hostile name": (
        lambda f: make_adapter_alone(f, base="\x1b[2Jbase\nno error here"),
        ["adapter", MERGE],
    ),
    "an adapter whose base is no name": (
        lambda f: make_adapter_alone(f, base={"a": [1]}),
        ["adapter", MERGE],
    ),
    "an adapter's config that is damaged": (
        lambda f: (make_adapter_alone(f), (f / "adapter_config.json").write_text("{")),
        ["adapter_config.json", "download"],
    ),
    "an adapter beside whole weights": (
        save_adapter,
        ["whole weights", "some/base", "remove adapter_config.json", MERGE],
    ),
    "an adapter's config beside whole weights": (
        lambda f: (save_adapter(f), (f / "adapter_model.safetensors").unlink()),
        ["whole weights", "remove adapter_config.json"],
    ),
    "an adapter beside shards": (
        lambda f: (save_shards(f, tensors_of(f)), remove_weights(f), save_adapter(f)),
        ["whole weights", "remove adapter_config.json"],
    ),
    "nothing": (remove_weights, ["model.safetensors", "`save_pretrained`"]),
    "a GGUF file": (replace_weights("model-q4_k_m.gguf"), ["GGUF", "converted from"]),
    "the authors' own format": (
        replace_weights("consolidated.safetensors"),
        ["consolidated.safetensors", "format of transformers"],
    ),
    "a state of PyTorch": (replace_weights("model.pth"), ["model.pth", "format of transformers"]),
    "a model of TensorFlow": (replace_weights("tf_model.h5"), ["tf_model.h5"]),
    "a variant": (replace_weights("model.fp16.safetensors"), ["a variant", "variant=.."]),
    "a variant in shards": (
        replace_weights("model.safetensors.index.fp16.json", b"{}"),
        ["a variant", "variant=.."],
    ),
    "shards without an index": (
        replace_weights("model-00001-of-00004.safetensors"),
        ["shard without its index", INDEX],
    ),
    "shards of several processes": (
        replace_weights("shard-00000-model-00001-of-00002.safetensors"),
        ["of several processes", "save the whole model"],
    ),
    "shards of several processes beside whole weights": (
        write("shard-00000-model-00001-of-00002.safetensors", "shard"),
        ["several processes", "remove those"],
    ),
    "a trainer's folder": (
        lambda f: (
            shutil.copytree(f, f / "checkpoint-500"),
            remove_weights(f),
            (f / "training_args.bin").write_bytes(b"state"),
        ),
        ["'checkpoint-500'", "give that one"],
    ),
    "a config that names other weights": (
        lambda f: change_json(f / "config.json", transformers_weights="mine.safetensors"),
        ["'mine.safetensors'", "rename"],
    ),
    "an empty file of weights": (replace_weights("model.safetensors", b""), ["is empty"]),
    "a pointer of git-lfs": (
        replace_weights("model.safetensors", LFS_POINTER.encode()),
        ["`git lfs pull`"],
    ),
    "an empty config": (write("config.json", ""), ["config.json", "is empty"]),
    "a config that is a list": (write("config.json", "[1]"), ["config.json", "list"]),
    "a config that is nested deeply": (
        write("config.json", f'{{"a": {DEEP_JSON}}}'),
        ["config.json", "download"],
    ),
    "a config that is no text": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"),
        ["config.json", "no JSON"],
    ),
    "a config that is a pointer of git-lfs": (
        write("config.json", LFS_POINTER),
        ["config.json", "`git lfs pull`"],
    ),
    "a quantisation that is a list": (
        lambda f: change_json(f / "config.json", quantization_config=[4]),
        ["quantization_config"],
    ),
    "a config that is nested": (
        write("config.json", f'{{"a": {"[" * 150}{"]" * 150}}}'),
        ["config.json", "nested", "download"],
    ),
    "an index that is a link to nothing": (
        lambda f: (remove_weights(f), (f / INDEX).symlink_to("nowhere")),
        [INDEX, "link", "download it again"],
    ),
    "an index that is a folder": (
        lambda f: (remove_weights(f), (f / INDEX).mkdir()),
        ["no model.safetensors in it"],
    ),
    "an empty index": (write_index(""), [INDEX, "is empty"]),
    "an index that is a list": (write_index([1]), [INDEX, "list"]),
    "an index that is nested deeply": (write_index(DEEP_JSON), [INDEX, "download"]),
    "an index without a map": (write_index({"metadata": {}}), [INDEX, "weight_map"]),
    "an index whose map is a list": (write_index({"weight_map": ["a"]}), [INDEX, "weight_map"]),
    "an index whose map is empty": (write_index({"weight_map": {}}), [INDEX, "weight_map"]),
    "an index of numbers": (write_index({"weight_map": {"score.weight": 7}}), [INDEX, "7"]),
    "an index of lists": (write_index({"weight_map": {"score.weight": ["a"]}}), [INDEX, "['a']"]),
    "an index of empty names": (write_index({"weight_map": {"score.weight": ""}}), [INDEX, "''"]),
    "an index that leaves the folder": (
        write_index({"weight_map": {"score.weight": "../model.safetensors"}}),
        [INDEX, "'../model.safetensors'"],
    ),
    "an index that names an absolute path": (
        write_index({"weight_map": {"score.weight": "/etc/passwd"}}),
        [INDEX, "'/etc/passwd'"],
    ),
    "an index of shards that are not there": (
        write_index({"metadata": {}, "weight_map": {"score.weight": "model-1.safetensors"}}),
        ["model-1.safetensors", "not there"],
    ),
    "an index of a name that is none": (
        write_index({"metadata": {}, "weight_map": {"score.weight": "a\0" + "b" * 300}}),
        ["'a\\x00bbb"],
    ),
    "an index of a name with an escape": (
        write_index({"metadata": {}, "weight_map": {"score.weight": "\x1b[2J.safetensors"}}),
        ["\\x1b", "not there"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_model_is_refused_with_the_right_remedy(folder, tmp_path, name):
    change, words = REFUSED[name]
    change(folder)
    check_refused(folder, tmp_path, *words)


def test_a_file_in_place_of_a_folder_is_refused(model):
    with input_error("it is a file", "give the folder"):
        load_reward_head(model / "model.safetensors")


def test_a_folder_that_is_nowhere_is_looked_for_on_the_hub(monkeypatch):
    """Only there the remedy is to check the name and the network."""
    import huggingface_hub

    def offline(*arguments, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for call in (load_reward_head, load_reward_model, model_identity):
        with input_error("some/model", "check the name and the network"):
            call("some/model")


NOT_LOADED = {  # the head can be read, and the whole model cannot be loaded
    "no config": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "a config of nothing": (write("config.json", "{}"), ["config.json", "empty"]),
    "an unknown architecture": (
        lambda f: change_json(f / "config.json", model_type="nobody's"),
        ["transformers", "nobody's"],
    ),
    "an architecture with a hostile name": (
        lambda f: change_json(f / "config.json", model_type="\x1b[2Jnobody's"),
        ["transformers", r"\x1b[2Jnobody's"],
    ),
    "a quantisation of nothing": (
        lambda f: change_json(f / "config.json", quantization_config={}),
        ["quantised", "as it was before"],
    ),
    "code of its own": (
        lambda f: change_json(
            f / "config.json", model_type="own", auto_map={"AutoConfig": "configuration.Own"}
        ),
        ["trust_remote_code"],
    ),
    "a missing shard": (
        lambda f: (
            save_shards(f, tensors_of(f)),
            remove_weights(f),
            (f / "model-00001-of-00002.safetensors").unlink(),
        ),
        ["names 1 files that are not there", "model-00001-of-00002.safetensors"],
    ),
    "a shard cut short": (
        lambda f: (
            save_shards(f, tensors_of(f)),
            remove_weights(f),
            os.truncate(f / "model-00001-of-00002.safetensors", 2000),
        ),
        ["model-00001-of-00002.safetensors", "no whole safetensors file"],
    ),
    "a shard that is a pointer of git-lfs": (
        lambda f: (
            save_shards(f, tensors_of(f)),
            remove_weights(f),
            (f / "model-00001-of-00002.safetensors").write_text(LFS_POINTER),
        ),
        ["model-00001-of-00002.safetensors", "`git lfs pull`"],
    ),
    "a weight in two shards": (
        lambda f: (
            save_shards(f, tensors_of(f)),
            remove_weights(f),
            *(
                add_to_shard(f / f"model-0000{number}-of-00002.safetensors", UP_PROJECTION)
                for number in (1, 2)
            ),
        ),
        [UP_PROJECTION, "in another of its files", "of different saves"],
    ),
    "an index without metadata": (
        lambda f: (
            save_shards(f, tensors_of(f)),
            remove_weights(f),
            change_json(f / INDEX, metadata=None),
        ),
        ["metadata"],
    ),
    "a trained adapter among the weights": (
        lambda f: save_single(
            f,
            {
                name.replace("q_proj", "q_proj.base_layer"): tensor
                for name, tensor in tensors_of(f).items()
            }
            | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, D)},
        ),
        ["adapter", MERGE],
    ),
    "a trained adapter of another kind among the weights": (
        lambda f: save_single(
            f,
            {
                name.replace("q_proj", "q_proj.base_layer"): tensor
                for name, tensor in tensors_of(f).items()
            }
            | {"model.layers.0.self_attn.q_proj.ia3_l.default": torch.ones(D, 1)},
        ),
        ["adapter", MERGE],
    ),
    "weights that an old quantiser packed": (
        lambda f: save_single(
            f,
            {name: tensor for name, tensor in tensors_of(f).items() if name != UP_PROJECTION}
            | {
                UP_PROJECTION.replace("weight", "qweight"): torch.ones(2, D, dtype=torch.int32),
                UP_PROJECTION.replace("weight", "scales"): torch.ones(1, D),
            },
        ),
        ["layers.0.mlp.up_proj", "quantised", "as it was before"],
    ),
    "a hostile name of a layer": (
        lambda f: save_single(f, {**tensors_of(f), "model.\x1b[2J.weight": torch.ones(2)}),
        ["weights", "\\x1b[2J"],
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("*token*")],
        ["tokenizer_name"],
    ),
    "no tokenizer but a folder of templates": (
        lambda f: (
            [path.unlink() for path in f.glob("*token*")],
            (f / "additional_chat_templates").mkdir(),
        ),
        ["tokenizer_name"],
    ),
    "a tokenizer that is a pointer of git-lfs": (
        write("tokenizer.json", LFS_POINTER),
        ["tokenizer.json", "`git lfs pull`"],
    ),
    "a tokenizer with a longest text that is no number": (
        lambda f: change_json(f / "tokenizer_config.json", model_max_length="many"),
        ["model_max_length", "'many'"],
    ),
    "an empty tokenizer": (write("tokenizer.json", ""), ["tokenizer.json", "empty"]),
}


@pytest.mark.parametrize("name", NOT_LOADED)
def test_what_transformers_cannot_load_is_refused_with_the_right_remedy(
    model, folder, tmp_path, name
):
    change, words = NOT_LOADED[name]
    change(folder)
    check_refused(folder, tmp_path, *words, by=["model"])
    assert torch.equal(load_reward_head(folder), load_reward_head(model))


def test_what_transformers_says_is_one_printable_line_without_a_remedy_of_ours_that_is_wrong(
    model, monkeypatch
):
    def fail(*arguments, **options):
        raise ImportError("Install it:\n\n  pip install \x1b[31mquantiser\x1b[0m\n" + "x" * 5000)

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", fail)
    with input_error(str(model), r"Install it: pip install \x1b[31mquantiser") as message:
        load_reward_model(model, "cpu")
    assert "network" not in message()
    assert len(message()) < len(str(model)) + 500


def test_only_a_missing_classifier_makes_way_for_the_model_alone(model, monkeypatch):
    """Any other ValueError of the classifier is the reason, which the model alone would hide."""

    def fail(*arguments, **options):
        raise ValueError("the weights are packed")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", fail)
    with input_error("the weights are packed"):
        load_reward_model(model, "cpu")


# ---- Numbers


PACKED = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_a_head_in_a_number_format_that_cannot_be_computed_with_is_refused(folder, tmp_path, dtype):
    tensors = tensors_of(folder)
    tensors["score.weight"] = (20 * tensors["score.weight"]).to(dtype)
    save_single(folder, tensors)
    check_refused(
        folder, tmp_path, "'score.weight'", "number format", "quantised", by=["head", "model"]
    )


@pytest.mark.parametrize("name", ["score.qweight", "score.weight_packed", "score.weight.absmax"])
def test_a_head_that_is_packed_is_refused(folder, tmp_path, name):
    tensors = tensors_of(folder)
    del tensors["score.weight"]
    save_single(folder, {**tensors, name: torch.ones(1, 2, dtype=torch.int32)})
    check_refused(folder, tmp_path, "head is quantised", name, by=["head", "export"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_head_in_another_float_is_read_as_float32(folder, dtype):
    tensors = tensors_of(folder)
    tensors["score.weight"] = tensors["score.weight"].to(dtype)
    save_single(folder, tensors)
    assert torch.equal(load_reward_head(folder), tensors["score.weight"].float().T)


@pytest.mark.parametrize("shape", [(), (1,), (D,), (1, 0), (0, D), (2, D), (1, D, 1)], ids=str)
def test_a_head_of_another_shape_is_refused(folder, tmp_path, shape):
    save_single(folder, tensors_of(folder) | {"score.weight": torch.ones(shape)})
    check_refused(folder, tmp_path, "exactly one scalar reward head", by=["head", "export"])


@pytest.mark.parametrize(
    "weight",
    [torch.ones(D), torch.tensor(1.0), torch.ones(0, 4), torch.ones(4, 0), torch.ones(2, 2, 2)],
    ids=lambda weight: str(tuple(weight.shape)),
)
def test_a_released_reference_of_another_shape_is_refused(folder, weight):
    name = "model.layers.0.mlp.down_proj.weight"
    whole = tensors_of(folder)
    assert torch.equal(load_released_reference(folder), whole[name][:, :1])
    save_single(folder, whole | {name: weight})
    with input_error(str(folder), name, "finite values"):
        load_released_reference(folder)


def test_a_released_reference_that_is_not_finite_is_refused(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    whole = tensors_of(folder)
    whole[name][3, 0] = float("nan")
    save_single(folder, whole)
    with input_error(str(folder), name, "finite values"):
        load_released_reference(folder)


def test_a_weight_whose_name_only_ends_alike_is_no_head(model, folder, tmp_path):
    tensors = tensors_of(folder)
    save_single(folder, tensors | {"old_score.weight": torch.ones(1, D)})
    assert torch.equal(load_reward_head(folder), load_reward_head(model))
    calls(folder, tmp_path)["export"]()
    head = tensors.pop("score.weight")
    save_single(folder, tensors | {"old_score.weight": head})
    check_refused(folder, tmp_path, "exactly one scalar reward head", by=["head", "export"])


def test_a_head_that_an_adapter_wraps_is_refused(folder, tmp_path):
    tensors = tensors_of(folder)
    head = tensors.pop("score.weight")
    tensors["score.modules_to_save.default.weight"] = head
    tensors["score.original_module.weight"] = head.clone()
    tensors["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(4, D)
    save_single(folder, tensors)
    check_refused(folder, tmp_path, "reward head", "adapter", MERGE, by=["head", "export"])
    # Some adapters are on the head alone.
    del tensors["model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    save_single(folder, tensors)
    check_refused(folder, tmp_path, "reward head", "adapter", MERGE, by=["head", "export"])


def test_a_head_of_zeros_is_refused(folder, tmp_path):
    save_single(folder, tensors_of(folder) | {"score.weight": torch.zeros(1, D)})
    check_refused(folder, tmp_path, "reward head", "not all 0", by=["head", "export"])


def test_a_config_that_asks_for_tuples_changes_no_states(folder, tokenizer):
    expected = embed_conversations([CONVERSATION], load_reward_model(folder)[0], tokenizer)
    change_json(folder / "config.json", return_dict=False)
    found = embed_conversations([CONVERSATION], load_reward_model(folder)[0], tokenizer)
    assert torch.equal(found, expected)


def test_a_head_beyond_float32_is_refused(folder, tmp_path):
    tensors = tensors_of(folder)
    tensors["score.weight"] = torch.full((1, D), 1e300, dtype=torch.float64)
    save_single(folder, tensors)
    check_refused(folder, tmp_path, "finite", by=["head", "export"])


def test_an_index_that_names_the_wrong_file_for_the_head_is_refused(folder, tmp_path):
    save_shards(folder, tensors_of(folder))
    remove_weights(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    (other,) = set(weight_map.values()) - {weight_map["score.weight"]}
    change_json(folder / INDEX, weight_map={**weight_map, "score.weight": other})
    check_refused(folder, tmp_path, "does not hold 'score.weight'", by=["head", "export"])


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_weights_in_packed_numbers_that_nobody_unpacks_are_refused(folder, tmp_path, dtype):
    """transformers takes integers for the weights themselves, in silence."""
    tensors = tensors_of(folder)
    tensors[UP_PROJECTION] = (20 * tensors[UP_PROJECTION]).to(dtype)
    save_single(folder, tensors)
    check_refused(folder, tmp_path, UP_PROJECTION, "names no quantiser", by=["model", "export"])


@pytest.mark.skipif(not ARCHIVES, reason="this torch's archives are not read")
@pytest.mark.parametrize("as_archive", [True, False], ids=["an archive", "without archive"])
@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_packed_weights_in_a_bin_file_are_refused(folder, tmp_path, dtype, as_archive):
    tensors = tensors_of(folder)
    packed = tensors | {UP_PROJECTION: tensors[UP_PROJECTION].to(dtype)}
    remove_weights(folder)
    file = folder / "pytorch_model.bin"
    torch.save(packed, file, _use_new_zipfile_serialization=as_archive)
    named = [UP_PROJECTION, str(dtype), "as it was before it was quantised"]
    if dtype.is_floating_point and not as_archive:  # torch does not load float8 from it
        named = ["transformers", "cannot load it"]
    check_refused(folder, tmp_path, *named, by=["model"])


def test_a_shard_without_weights_does_no_harm(folder, tokenizer, tmp_path):
    expected = tensors_of(folder)
    save_shards(folder, expected)
    remove_weights(folder)
    save_file({}, folder / "model-00003-of-00003.safetensors", {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    change_json(
        folder / INDEX,
        weight_map={**index["weight_map"], "left.over": "model-00003-of-00003.safetensors"},
    )
    backbone, _ = load_reward_model(folder, "cpu")
    assert torch.equal(backbone.norm.weight, expected["model.norm.weight"])
    assert torch.equal(load_reward_head(folder), expected["score.weight"].T)


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "nobody's"])
def test_weights_in_packed_numbers_without_a_scale_are_refused(folder, tmp_path, method):
    tensors = tensors_of(folder)
    tensors[UP_PROJECTION] = tensors[UP_PROJECTION].to(torch.float8_e4m3fn)
    save_single(folder, tensors)
    change_json(folder / "config.json", quantization_config={"quant_method": method})
    check_refused(folder, tmp_path, UP_PROJECTION, "scale is missing", by=["model", "export"])


def test_masks_in_bytes_are_no_packed_weights(folder, tokenizer):
    """Old checkpoints of GPT-2 keep the mask of attention, which nobody reads."""
    tensors = tensors_of(folder)
    save_single(folder, {**tensors, "attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)})
    backbone, _ = load_reward_model(folder, "cpu", tokenizer=tokenizer)
    assert torch.equal(backbone.norm.weight, tensors["model.norm.weight"])


QUANTISERS = {
    "bitsandbytes": dict(load_in_4bit=True),
    "gptq": dict(bits=4, group_size=128),
    "awq": dict(bits=4, group_size=128, version="gemm"),
    "fbgemm_fp8": dict(),
    "compressed-tensors": dict(format="pack-quantized"),
    "torchao": dict(quant_type="int8_weight_only"),
    "quanto": dict(weights="int8"),
    "hqq": dict(quant_config={"nbits": 4}),
    "nobody's": dict(),
}


@pytest.mark.parametrize("method", QUANTISERS)
@pytest.mark.parametrize("nested", [False, True], ids=["at the top", "nested"])
def test_a_quantised_model_is_refused_with_what_its_quantiser_says(
    folder, tmp_path, tokenizer, method, nested
):
    """None of these is installed with the requirements; whoever has one gets its model, or a line.

    As bitsandbytes keeps them, each weight has a scale in a tensor of its own.
    """
    tensors = tensors_of(folder)
    tensors[UP_PROJECTION] = tensors[UP_PROJECTION].to(torch.int8)
    tensors[UP_PROJECTION.replace("weight", "SCB")] = torch.ones(2 * D)
    save_single(folder, tensors)
    settings = {"quant_method": method, **QUANTISERS[method]}
    if nested:
        change_json(folder / "config.json", text_config={"quantization_config": settings})
    else:
        change_json(folder / "config.json", quantization_config=settings)
    check_refused(folder, tmp_path, "quantised", repr(method), "as it was before", by=["model"])
    assert load_reward_head(folder).shape == (D, 1)


def test_float8_with_a_scale_is_loaded_as_its_quantiser_says(model, folder, tmp_path, tokenizer):
    tensors = tensors_of(folder)
    packed = (30 * tensors[UP_PROJECTION]).to(torch.float8_e4m3fn)
    scale = torch.full((1, 1), 1 / 30)
    tensors |= {UP_PROJECTION: packed, UP_PROJECTION + "_scale_inv": scale}
    save_single(folder, tensors)
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    change_json(folder / "config.json", quantization_config=settings)
    try:
        backbone, _ = load_reward_model(folder, "cpu", tokenizer=tokenizer)
    except utils.InputError:  # transformers 4.46 does not know it
        check_refused(folder, tmp_path, "quantised ('fp8')", by=["model"])
        return
    expected = packed.float() * scale
    torch.testing.assert_close(backbone.layers[0].mlp.up_proj.weight, expected)


# ---- The hub


def serve_from(monkeypatch, folder, snapshot):
    """Let the hub serve the files of a folder as "some/model" -> the list of what was fetched."""
    import fnmatch

    import huggingface_hub

    fetched = []

    def snapshot_download(name, allow_patterns):
        assert name == "some/model"
        snapshot.mkdir(exist_ok=True)
        for path in folder.iterdir():
            is_wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns)
            if is_wanted and not (snapshot / path.name).exists():
                shutil.copy(path, snapshot)
                fetched.append(path.name)
        return str(snapshot)

    names = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name: names)
    return fetched


def test_of_a_model_on_the_hub_only_what_is_read_is_downloaded(
    monkeypatch, folder, tokenizer, tmp_path
):
    tensors = tensors_of(folder)
    save_shards(folder, tensors)
    remove_weights(folder)
    save_file(tensors, folder / "consolidated.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    fetched = serve_from(monkeypatch, folder, tmp_path / "snapshot")

    assert torch.equal(load_reward_head("some/model"), tensors["score.weight"].T)
    assert sorted(fetched) == sorted(["config.json", INDEX, weight_map["score.weight"]])
    backbone, _ = load_reward_model("some/model", "cpu", tokenizer=tokenizer)
    assert torch.equal(backbone.norm.weight, tensors["model.norm.weight"])
    assert model_identity("some/model") == model_identity(folder)
    assert not {"consolidated.safetensors", "pytorch_model.bin"} & set(fetched)


def test_an_adapter_on_the_hub_is_refused_before_its_download(monkeypatch, folder, tmp_path):
    save_adapter(folder)
    fetched = serve_from(monkeypatch, folder, tmp_path / "snapshot")
    for call in (load_reward_head, load_reward_model, model_identity):
        with input_error("some/model", "whole weights", "some/base"):
            call("some/model")
    remove_weights(folder)
    serve_from(monkeypatch, folder, tmp_path / "snapshot")
    for call in (load_reward_head, load_reward_model, model_identity):
        with input_error("some/model", "an adapter", "some/base", MERGE):
            call("some/model")
    assert set(fetched) == {"config.json", "adapter_config.json"}


def test_a_model_that_was_downloaded_is_found_without_the_hub(monkeypatch, folder, tmp_path):
    import huggingface_hub

    def offline(name):
        raise ConnectionError("no route to the hub")

    serve_from(monkeypatch, folder, tmp_path / "snapshot")
    head = load_reward_head("some/model")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    assert torch.equal(load_reward_head("some/model"), head)


# ---- Identity


def test_an_ordinary_models_identity_is_of_its_config_and_weights(model):
    """So that embeddings of earlier versions stay those of this model."""
    digests = {
        name: lore.reward_model.digest_of(model / name)
        for name in ("config.json", "model.safetensors")
    }
    assert model_identity(model)["weights"] == lore.reward_model.digest_of(digests)


@pytest.mark.parametrize("digest", [5, None, ["a"], {}, True], ids=repr)
def test_a_kept_digest_that_is_no_text_is_computed_again(model, tmp_path, monkeypatch, digest):
    monkeypatch.setattr(lore.reward_model, "_known_digests", {})
    expected = model_identity(model, tmp_path)
    kept = json.loads((tmp_path / "digests.json").read_text())
    for content in (dict.fromkeys(kept, digest), [digest]):
        lore.reward_model._known_digests.clear()
        (tmp_path / "digests.json").write_text(json.dumps(content))
        assert model_identity(model, tmp_path) == expected
        assert json.loads((tmp_path / "digests.json").read_text()) == kept


def test_a_missing_shard_leaves_no_identity(folder, tmp_path):
    save_shards(folder, tensors_of(folder))
    remove_weights(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    check_refused(folder, tmp_path, "model-00002-of-00002.safetensors", by=["identity"])
