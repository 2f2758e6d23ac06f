"""Which pairs are the same, and how many test pairs repeat a training pair.

The parts of this module, in their order:

    Identity    a key of each pair, equal for equal pairs, whichever way round they are
    Leaks       the shares of test pairs that repeat the training, by kinds of repeats
"""

import bisect
import functools
import itertools
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import normalize

from lore.normal_forms import as_read, key_of, message_texts
from lore.study import Features, Study
from utils import (
    SEEN_TEST,
    UNSEEN_TEST,
    Pairs,
    from_each_process,
    one_torch_thread,
    pair_scores,
    process_rank,
    shared_out,
    table_number,
)

MOST_KNOWN_PAIRS = 2**17  # whose keys by their texts are kept
HASHED_ROWS = 1024  # of a table's pairs are made at once, to be hashed

NEARLY_EQUAL = 0.99  # pairs whose features have a larger |cosine| repeat each other
SKETCH = 128  # columns; cosines of wider features are estimated from so many random projections


# ---- Identity


@dataclass
class Identity:
    """What tells m pairs apart, those of one user or of several."""

    keys: np.ndarray  # uint64 [m], equal for equal pairs, whichever way round
    turned: np.ndarray  # bool [m], whether the pair is the other way round than its key has it

    def __getitem__(self, rows: slice) -> "Identity":
        return Identity(self.keys[rows], self.turned[rows])


def identities(
    study: Study, parts: tuple[str, ...], share_out: bool = False
) -> dict[str, list[Identity]]:
    """The identity of all pairs in some parts of a study: {part: one Identity per user}.

    Pairs are equal if their two answers are. If the study knows the texts of all these parts, the
    texts are compared, and the prompts may differ; else the features, which must be equal in
    every bit, but for their sign.
    share_out: each process of torchrun takes its own users, so all of them must call this.
    """
    if all(part in study.texts for part in parts):
        users_of_part, identify = study.texts, identities_of_texts
    else:
        users_of_part, identify = study.features(), identities_of_features
    if share_out:
        return {part: shared_out(identify, users_of_part[part]) for part in parts}
    return {part: identify(users_of_part[part]) for part in parts}


def identities_of_texts(users: list[list[tuple[str, str]]]) -> list[Identity]:
    """The identity of the pairs of each user, by their texts."""
    return [identity_of_texts(texts) for texts in users]


def identity_of_texts(texts: list[tuple[str, str]]) -> Identity:
    """The identity of one user's pairs by their texts: chosen, rejected."""
    known = [identity_of_answers(pair) for pair in texts]
    keys = [key for key, _ in known]
    turned = [is_turned for _, is_turned in known]
    return Identity(np.array(keys, np.uint64), np.array(turned, bool))


@functools.lru_cache(MOST_KNOWN_PAIRS)
def identity_of_answers(texts: tuple[str, str]) -> tuple[int, bool]:
    """The key of a pair by its texts, and whether it is turned.

    Kept, because hundreds of users may compare the same answers.
    """
    chosen, rejected = map(as_read, texts)
    first, second = sorted((chosen, rejected))  # the same if the pair is turned round
    # The length is there because ("ab", "c") and ("a", "bc") are not equal.
    key = key_of(f"{len(first)} {first}{second}".encode(errors="surrogatepass"))
    return key, chosen != first


def identities_of_features(features: Features) -> list[Identity]:
    """The identity of the pairs of each user, by their features up to sign.

    The pairs of users who share a table are hashed together, each distinct one once: thousands of
    users may compare the same answers.
    """
    identities = []
    for table, users_of_table in itertools.groupby(features, table_number):
        if table is None:
            identities += map(identity_of_rows, users_of_table)
            continue
        users = list(users_of_table)
        identity = identity_of_table_pairs(users)
        first = 0
        for X in users:
            identities.append(identity[first : first + len(X)])
            first += len(X)
    return identities


def identity_of_table_pairs(users: list[Pairs]) -> Identity:
    """The identity of the pairs of all users together; they must share a table."""
    table = users[0].embeddings
    chosen = np.concatenate([X.chosen.cpu().numpy() for X in users])
    rejected = np.concatenate([X.rejected.cpu().numpy() for X in users])
    low = np.minimum(chosen, rejected)
    high = np.maximum(chosen, rejected)
    distinct, places = np.unique(low * len(table) + high, return_inverse=True)
    low, high = np.divmod(distinct, len(table))
    slices = [slice(row, row + HASHED_ROWS) for row in range(0, len(distinct), HASHED_ROWS)]
    hashed = [identity_of_rows(Pairs(table, low[rows], high[rows]).dense()) for rows in slices]
    keys = np.concatenate([identity.keys for identity in hashed])
    turned = np.concatenate([identity.turned for identity in hashed])
    return Identity(keys[places], turned[places] ^ (chosen > rejected))


def identity_of_rows(X: torch.Tensor) -> Identity:
    """The identity of pairs by their features `[m, d]`.

    A pair and its negative have the key of the one whose first number that is not 0 is positive.
    """
    rows = X.float().cpu().numpy()
    first = (rows != 0).argmax(1)
    turned = rows[np.arange(len(rows)), first] < 0
    upright = np.where(turned[:, None], -rows, rows) + np.float32(0)  # no negative zero
    keys = [key_of(row.tobytes()) for row in upright]
    return Identity(np.array(keys, np.uint64), turned)


# ---- Leaks


# by_prompt, by_answers, by_answer_in_prompt, by_features; None: not known
Shares = dict[str, float | None]


def leaks_of(study: Study) -> dict[str, Shares]:
    """How much of the test repeats the training: {setting: Shares}.

    Under SEEN_TEST shares of the seen users' test pairs, which repeat one of their training pairs;
    under UNSEEN_TEST shares of the unseen users' test pairs, which repeat one of their few shots:

    - by_prompt: the prompt or the conversation is that of a training pair of anybody among these
      users, or the conversation is one that the same user was trained on. For the latter the test
      parts of `study.groups` must number a user's conversations as the training parts do.
    - by_answers: the two answers are those of a training pair of anybody among these users, either
      way round and under whatever prompt: a model may know by heart which of the two is preferred.
    - by_answer_in_prompt: the prompt of a training pair of anybody among these users goes on with
      the tested conversation: it begins with the prompt of the test pair and then one of its two
      answers, as an earlier turn. So the training has shown what was chosen. The same answer in
      another conversation shows nothing: stock answers, such as "Yes, of course.", are in many.
    - by_features: the features are nearly those of a training pair of the same user, or their
      negative, see `repeats_by_features`.

    None is a share that is not known, because the study does not know prompts, conversations or
    texts.
    Every process of torchrun must call this. Each takes its own users' features, and the first one
    all texts, as a text is looked up among those of all users.
    """
    # All users at once, as seen and unseen ones often share their tables.
    repeats = shared_out(
        repeats_by_features, study.train + study.train_unseen, study.test + study.test_unseen
    )
    by_features = {
        SEEN_TEST: repeats[: len(study.test)],
        UNSEEN_TEST: repeats[len(study.test) :],
    }
    parts = {SEEN_TEST: ("train", "test"), UNSEEN_TEST: ("train_unseen", "test_unseen")}
    leaks = None
    if process_rank() == 0:
        leaks = {
            setting: {
                "by_prompt": share_by_prompt(study, train, test),
                "by_answers": share_by_answers(study, train, test),
                "by_answer_in_prompt": share_by_answer_in_prompt(study, train, test),
                "by_features": torch.cat(by_features[setting]).double().mean().item(),
            }
            for setting, (train, test) in parts.items()
        }
    return from_each_process(leaks)[0]


def share_by_prompt(study: Study, train: str, test: str) -> float | None:
    """The share of the test pairs with a prompt, or of a conversation, that was trained on."""
    repeats = []
    if train in study.prompts and test in study.prompts:
        repeats.append(are_known(study.prompts[train], study.prompts[test]))
    if train in study.conversations and test in study.conversations:
        repeats.append(are_known(study.conversations[train], study.conversations[test]))
    if train in study.groups and test in study.groups:
        conversations = {part: conversations_of(study.groups[part]) for part in (train, test)}
        repeats.append(are_known(conversations[train], conversations[test]))
    if not repeats:
        return None
    return float(np.any(repeats, axis=0).mean())


def conversations_of(groups: list[torch.Tensor]) -> Iterator[list[tuple[int, int]]]:
    """For each user in turn what tells the conversations of all users apart, a value per pair."""
    for user, numbers in enumerate(groups):
        yield [(user, number) for number in numbers.tolist()]


def share_by_answers(study: Study, train: str, test: str) -> float | None:
    """The share of the test pairs whose two answers are those of a training pair."""
    if train not in study.texts or test not in study.texts:
        return None
    answers = {
        part: [identity_of_texts(user_texts).keys.tolist() for user_texts in study.texts[part]]
        for part in (train, test)
    }
    return float(are_known(answers[train], answers[test]).mean())


def share_by_answer_in_prompt(study: Study, train: str, test: str) -> float | None:
    """The share of the test pairs whose prompt and an answer are how a training prompt begins.

    Texts are compared as a reader sees them, all messages of a prompt in a row, so that prompts
    which hold earlier turns as one plain text count, too.
    """
    if train not in study.prompts or test not in study.prompts or test not in study.texts:
        return None
    trained = set(itertools.chain.from_iterable(study.prompts[train]))
    tested = list(itertools.chain.from_iterable(study.prompts[test]))
    if not all(isinstance(prompt, str) for prompt in trained.union(tested)):
        return None
    training_texts = sorted(map(prompt_as_read, trained))
    # Most prompts are never gone on with: of these no answer needs to be read.
    text_of = {}
    for prompt in set(tested):
        text = prompt_as_read(prompt)
        if begins_one_of(training_texts, text):
            text_of[prompt] = text
    pairs = itertools.chain.from_iterable(study.texts[test])
    repeats = [
        prompt in text_of
        and any(
            begins_one_of(training_texts, f"{text_of[prompt]} {as_read(answer)}") for answer in pair
        )
        for prompt, pair in zip(tested, pairs)
    ]
    return sum(repeats) / len(repeats)


def prompt_as_read(prompt: str) -> str:
    """The messages of a prompt of `Study.prompts` in a row, as a reader sees them."""
    return as_read(" ".join(message_texts(prompt)))


def begins_one_of(texts: list[str], beginning: str) -> bool:
    """Whether one of the texts, which are sorted, begins like this."""
    place = bisect.bisect_left(texts, beginning)  # what begins with a text comes right behind it
    return place < len(texts) and texts[place].startswith(beginning)


def are_known(
    trained: Iterable[Iterable[Hashable]], tested: Iterable[Iterable[Hashable]]
) -> np.ndarray:
    """Which of the values of all users in `tested` are among those in `trained`: bool `[m]`."""
    known = set(itertools.chain.from_iterable(trained))
    return np.array([value in known for value in itertools.chain.from_iterable(tested)], bool)


@one_torch_thread()  # the products are small, and its threads would wait for one another
def repeats_by_features(train: Features, test: Features) -> list[torch.Tensor]:
    """Which test pairs have nearly the features of a train pair of the same user, bool `[m_i]`.

    Nearly: an absolute cosine above NEARLY_EQUAL. Cosines of features of up to SKETCH columns are
    exact. Those of wider ones are estimated from random projections, which hardly ever take a
    cosine of .98 or .995 for one on the other side of .99; so the embeddings are multiplied once,
    and not every test pair with every train pair.
    """
    d = train[0].shape[1]
    projections = torch.eye(d)
    if d > SKETCH:
        projections = torch.randn(d, SKETCH, generator=torch.Generator().manual_seed(0))
    repeats = []
    for known, tested in zip(pair_scores(train, projections), pair_scores(test, projections)):
        cosines = normalize(tested) @ normalize(known).T  # (m_test, m_train)
        repeats.append(cosines.abs().amax(1) > NEARLY_EQUAL)
    return repeats
