"""What others take from a basis: an exported model, and a reward for trainers."""

import json
import os
import shutil

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

import lore.embedding
import lore.export
import utils
from lore.export import export_reward_model
from lore.reward_model import load_reward_model
from lore.rewards import best_of_n, personal_reward

pytestmark = pytest.mark.usefixtures("one_thread")
D, K = 64, 3
CONVERSATIONS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    for prompt, answer in (
        ("Where do we eat?", "At the pier."),
        ("And then?", "We walk home along the canal, if it does not rain."),
    )
] + [
    [
        {"role": role, "content": text}
        for role, text in (
            ("user", "One?"),
            ("assistant", "Two."),
            ("user", "Three?"),
            ("assistant", "Four, and then we stop."),
        )
    ]
]
# What a server does: batches, padded, with the pad token that the folder says
SERVER = """
import importlib.util, json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
assert importlib.util.find_spec("utils") is None
folder, conversations = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
texts = [tokenizer.apply_chat_template(conversation, tokenize=False) for conversation in conversations]
tokens = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
with torch.no_grad():
    logits = model(tokens["input_ids"], tokens["attention_mask"]).logits
print(json.dumps([logits.tolist(), str(logits.dtype), model.config.problem_type, model.config.id2label,
                  tokenizer.pad_token, model.config.pad_token_id == tokenizer.pad_token_id, type(model).__name__]))
"""


def changed(path, **values):
    """Replace entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("models") / "single", hidden_size=D)


@pytest.fixture(scope="module")
def sharded(single, tmp_path_factory):
    """The same model in several files, the head not alone in its own; tied embeddings; a pad token that ends a turn."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "sharded"
    shutil.copytree(single, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForSequenceClassification.from_pretrained(single).save_pretrained(
        folder, max_shard_size="200KB"
    )
    changed(folder / "config.json", tie_word_embeddings=True, pad_token_id=3)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            changed(folder / name, pad_token="<|eot_id|>")
    return folder


@pytest.fixture(scope="module")
def basis():
    return planted_basis(D, K, length=30.0), planted_weights(7, K)


def served(folder):
    """What a fresh process with transformers only makes of a folder."""
    status, out, err = outcome(
        fresh_process(SERVER, folder, json.dumps(CONVERSATIONS), PYTHONPATH="")
    )
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def states(model_name, dtype=torch.float64):
    """phi of each of CONVERSATIONS in float64 `[n, d]`."""
    backbone, tokenizer = load_reward_model(str(model_name), "cpu", dtype=dtype)
    ids = [
        tokenizer(
            tokenizer.apply_chat_template(conversation, tokenize=False),
            add_special_tokens=False,
            return_tensors="pt",
        ).input_ids
        for conversation in CONVERSATIONS
    ]
    with torch.no_grad():
        return torch.stack([backbone(input_ids=one).last_hidden_state[0, -1] for one in ids])


# ---- Export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["single", "sharded"])
@pytest.mark.parametrize("whose", [2, None])
def test_an_export_gives_the_personalised_reward_to_transformers_alone(
    request, basis, tmp_path, kind, whose
):
    model, (V, W) = request.getfixturevalue(kind), basis
    export_reward_model(tmp_path / "export", model, V, None if whose is None else W[whose])
    logits, dtype, problem_type, labels, pad, same_pad, name = served(tmp_path / "export")
    expected = states(model) @ (
        V.double() if whose is None else (V.double() @ W[whose].double())[:, None]
    )
    size = float(expected.abs().max())
    torch.testing.assert_close(torch.tensor(logits).double(), expected, rtol=1e-5, atol=1e-5 * size)
    assert (
        dtype == "torch.float32"
        and problem_type == "regression"
        and name == "LlamaForSequenceClassification"
    )
    assert len(labels) == (K if whose is None else 1) and pad == "<|pad|>" and same_pad


def test_the_backbones_shards_are_linked_but_the_one_that_held_the_old_head(
    sharded, basis, tmp_path
):
    export_reward_model(tmp_path / "export", sharded, basis[0])
    old, new = (
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        for folder in (sharded, tmp_path / "export")
    )
    assert old.keys() == new.keys() and len(set(old.values())) > 2
    for name in old.keys() - {"score.weight"}:
        linked = os.path.samefile(sharded / old[name], tmp_path / "export" / new[name])
        assert linked == (old[name] != old["score.weight"])
    assert [tensor for tensor, file in new.items() if file == new["score.weight"]] == [
        "score.weight"
    ]
    modes = {
        path.name: path.stat().st_mode
        for path in (tmp_path / "export").iterdir()
        if path.stat().st_nlink == 1
    }
    assert len(set(modes.values())) == 1, modes


def test_where_links_fail_the_shards_are_copied(monkeypatch, sharded, basis, tmp_path):
    def refuse(*arguments):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    export_reward_model(tmp_path / "export", sharded, *basis[:1])
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "export").iterdir())


def test_the_card_names_data_rank_seed_and_evidence(single, basis, tmp_path):
    interval = {"mean": 0.75, "low": 0.7, "high": 0.8}
    export_reward_model(
        tmp_path / "export",
        single,
        *basis[:1],
        about={
            "config": {"data": "the data"},
            "K": K,
            "alpha": 0.5,
            "seed": 17,
            "users": list("abcde"),
            "verdict": {"text": "Undecided: so far."},
            "evidence": [
                {
                    "K": K,
                    "alpha": alpha,
                    "accuracy": {utils.UNSEEN_TEST: {**interval, "mean": mean}},
                }
                for alpha, mean in ((0, 0.71), (0.5, 0.75))
            ],
        },
    )
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
    assert "0.710" not in card


def test_a_tokenizer_without_a_spare_token_is_refused_with_the_reason(single, basis, tmp_path):
    shutil.copytree(single, tmp_path / "model")
    tokens = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    tokens["added_tokens"] = [
        token for token in tokens["added_tokens"] if token["content"] != "<|pad|>"
    ]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokens))
    for path in (tmp_path / "model").glob("*.json"):
        if path.name in ("tokenizer_config.json", "special_tokens_map.json"):
            changed(
                path,
                pad_token="<|eot_id|>",
                **({"added_tokens_decoder": {}} if "config" in path.name else {}),
            )
    with input_error("to its tokenizer", "end of a turn"):
        export_reward_model(tmp_path / "export", tmp_path / "model", basis[0])
    assert not (tmp_path / "export").exists()


def test_a_model_with_code_of_its_own_is_refused_with_the_reason(single, basis, tmp_path):
    shutil.copytree(single, tmp_path / "model")
    changed(tmp_path / "model" / "config.json", auto_map={"AutoModel": "modeling.Own"})
    with input_error("trust_remote_code", "code of its own"):
        export_reward_model(tmp_path / "export", tmp_path / "model", basis[0])
    assert not (tmp_path / "export").exists()


def test_an_interrupted_export_leaves_nothing(monkeypatch, single, basis, tmp_path):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(lore.export, "_prove_export", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_reward_model(tmp_path / "export", single, basis[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["head", "pad", "backbone"])
def test_an_export_whose_logits_are_not_the_rewards_is_refused_and_leaves_nothing(
    monkeypatch, single, basis, tmp_path, damage
):
    write = lore.export._write_checkpoint

    def spoil(folder, model, tokenizer, pad_name, head):
        write(folder, model, tokenizer, pad_name, head * (1.001 if damage == "head" else 1))
        if damage == "pad":  # the end of a turn, which stands in the middle of a conversation too
            changed(folder / "config.json", pad_token_id=3)
        if damage == "backbone":
            changed(folder / "config.json", num_hidden_layers=1)

    monkeypatch.setattr(lore.export, "_write_checkpoint", spoil)
    with input_error("nothing was written"):
        export_reward_model(tmp_path / "export", single, basis[0])
    assert not list(tmp_path.iterdir())


def test_bases_and_folders_that_do_not_fit_are_refused(single, basis, tmp_path):
    V, W = basis
    with input_error("V: shape"):
        export_reward_model(tmp_path / "export", single, V[1:])
    with input_error("w: shape"):
        export_reward_model(tmp_path / "export", single, V, W[0, 1:])
    with input_error("not empty"):
        export_reward_model(single, single, V)
    assert not (tmp_path / "export").exists()


# ---- A reward for trainers ------------------------------------------------------------------------------------------


def conversational(text, role):
    return [{"role": role, "content": text}]


def test_a_personal_reward_scores_every_completion_for_its_user(monkeypatch, single, basis):
    V, W = basis
    calls, embed = [], lore.embedding.embed_conversations
    monkeypatch.setattr(
        lore.rewards,
        "embed_conversations",
        lambda *arguments, **options: calls.append(options) or embed(*arguments, **options),
    )
    reward = personal_reward(single, V, {"ada": W[0], 7: W[1].tolist()}, token_budget=64)
    prompts, completions, users = (
        ["One?", "One?", "Two?"],
        ["yes", "no", "it is so"],
        ["ada", 7, "ada"],
    )
    found = reward(prompts, completions, user=users, prompt_id=[1, 2, 3])
    assert reward.__name__ == "personal_reward" and calls == [{"token_budget": 64}]
    backbone, tokenizer = load_reward_model(str(single), "cpu")
    for prompt, completion, user, score in zip(prompts, completions, users, found, strict=True):
        phi = state_alone(
            backbone,
            tokenizer,
            conversational(prompt, "user") + conversational(completion, "assistant"),
        )
        assert isinstance(score, float)
        expected = phi.double() @ V.double() @ W[int(user != "ada")].double()
        assert score == pytest.approx(float(expected), rel=1e-4, abs=1e-3)
    assert found == pytest.approx(
        reward(
            [conversational(prompt, "user") for prompt in prompts],
            [conversational(completion, "assistant") for completion in completions],
            users,
        )
    )
    with input_error("user 'eve'", "fit_new_user"):
        reward(prompts, completions, user=["ada", "eve", 7])


def test_each_process_of_a_trainer_scores_its_own_completions(monkeypatch, single, basis):
    reward = personal_reward(single, basis[0], {"ada": basis[1][0]}, "cpu")
    alone = reward(["One?"], ["yes"], ["ada"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert reward(["One?"], ["yes"], ["ada"]) == alone and os.environ["RANK"] == "1"


def test_best_of_n_gives_scores_and_their_order():
    scores, order = best_of_n(
        lambda prompts, completions, user: [
            len(text) * (user[i] == "ada") * (prompts[i] == "One?")
            for i, text in enumerate(completions)
        ],
        "One?",
        ["yes", "indeed", "no"],
        "ada",
    )
    assert scores == [3, 6, 2] and order == [1, 0, 2]


def test_trl_trains_with_the_callable_and_with_an_exported_folder(single, basis, tmp_path):
    trl = pytest.importorskip("trl")  # tests/trl-requirements.txt
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    V, W = basis
    export_reward_model(tmp_path / "export", single, V, W[0])
    reward, seen = personal_reward(single, V, {"ada": W[0], "ben": W[1]}), []

    def listening(prompts, completions, **columns):
        seen.append(
            (prompts, completions, columns["user"], reward(prompts, completions, **columns))
        )
        return seen[-1][-1]

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
    trainer = trl.GRPOTrainer(
        model=policy,
        processing_class=tokenizer,
        reward_funcs=[reward, listening, str(tmp_path / "export")],
        train_dataset=Dataset.from_list(
            [
                {"prompt": conversational("Shall we?", "user"), "user": user}
                for user in ("ada", "ben") * 4
            ]
        ),
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
    logged = [
        entry for entry in trainer.state.log_history if "rewards/personal_reward/mean" in entry
    ]
    assert len(logged) == 2 and len(seen) == 2
    for entry, (_, _, _, scores) in zip(logged, seen):
        assert entry["rewards/personal_reward/mean"] == pytest.approx(
            sum(scores) / len(scores), rel=1e-4
        )
    assert {user for _, _, users, _ in seen for user in users} == {"ada", "ben"}


def test_what_does_not_fit_together_is_one_line(single, basis, tmp_path):
    V, W = basis
    reward = personal_reward(single, V, {"ada": W[0]})
    for arguments in (
        (["a"], ["b", "c"], ["ada"]),
        (["a", "b"], ["c"], ["ada"]),
        (["a"], ["b"], ["ada"] * 2),
    ):
        with input_error("equally many"):
            reward(*arguments[:2], user=arguments[2])
    with input_error("neither a text nor"):
        best_of_n(reward, "a", [None], "ada")
    for about in ({"identity": {"reward_head": "another's"}}, {"K": K - 1}):
        with input_error("this basis"):
            export_reward_model(tmp_path / "export", single, V, about=about)
    (tmp_path / "file").write_text("")
    with input_error("a file, or not empty"):
        export_reward_model(tmp_path / "file", single, V)
    assert not (tmp_path / "export").exists()
