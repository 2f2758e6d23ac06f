"""The rows of comparisons: the schema of own data, and that of each public data set.

A comparison is one answer that a person preferred to another answer to the same prompt. Each kind
of row gives its comparisons, and says why a part of it gives none.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import pydantic
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictStr,
    Tag,
)
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from lore.data_files import SPLIT_WORDS
from lore.normal_forms import Id, Turns, without_messages
from lore.rows import as_messages

# Why a part of a row is left out, as `prepare.py` counts it
NO_PREFERENCE = "turns without a preferred response, with the turns after them"
EMPTY_TURN = "turns without a prompt before others, with the turns after them"
NO_OPINION = "annotations without a preference"
TIE = "ties"


class Message(TypedDict):
    role: Literal["system", "user", "assistant"]
    content: StrictStr


def as_list(turns: Any) -> Any:
    """One message as a list of messages; anything else as it is."""
    return [turns] if isinstance(turns, dict) else turns


def none_if_blank(value: Any) -> Any:
    """None for what an empty cell becomes: an empty text, or not-a-number."""
    return None if value == "" or value != value else value


def split_called(name: Any) -> Any:
    """The split with this name, such as "validation" for "dev"; an unknown name as it is."""
    for split, names in SPLIT_WORDS.items():
        if name in names:
            return split
    return none_if_blank(name)


def form_of_turns(turns: Any) -> str | None:
    """The tag of the form below that this has; None: it has neither."""
    if isinstance(turns, str):
        return "text"
    return "messages" if isinstance(turns, list | tuple) else None


Text = Annotated[StrictStr, Tag("text")]
Messages = Annotated[list[Message], Field(min_length=1), Tag("messages")]
TextOrMessages = Annotated[
    Text | Messages,
    Discriminator(
        form_of_turns,
        custom_error_type="turns",
        custom_error_message="Input should be a text, a message or a list of messages",
    ),
]
# A prompt or an answer in a row; one message is a list of one.
TurnsOfRow = Annotated[TextOrMessages | None, BeforeValidator(as_list)]
OptionalId = Annotated[Id | None, BeforeValidator(none_if_blank)]
OptionalText = Annotated[StrictStr | None, BeforeValidator(none_if_blank)]


class Comparison(NamedTuple):
    """Who preferred which of two answers to a prompt."""

    user: str
    prompt: Turns
    chosen: Turns
    rejected: Turns
    conversation: str | None = None  # an id, which says the same in all rows
    language: str | None = None
    split: str | None = None  # of SPLIT_WORDS; None: not given


class LeftOut(NamedTuple):
    """A part of a row that gives no comparison."""

    reason: str


class Row(BaseModel):
    """A row of own data or of a public data set.

    A kind of row is told by its columns, see `kind_of`. What a row says of its user, such as an
    age, is in columns that no field names.
    """

    model_config = ConfigDict(extra="allow")

    dataset: ClassVar[str]  # what has this schema, for errors
    telltale: ClassVar[set[str]] = set()  # columns that a row of this kind has
    full_size: ClassVar[int | None] = None  # rows of a full copy, as its own page says
    all_users_are_seen: ClassVar[bool] = False

    def comparisons(self) -> Iterator[Comparison | LeftOut]:
        """The comparisons of this row, and what is left out of it."""
        raise NotImplementedError


class OwnRow(Row):
    """A row of own data. An answer may begin with the prompt, as text or in messages."""

    dataset = "{user, prompt, chosen, rejected}, with optional split, conversation and language"

    user: Id = Field(validation_alias=AliasChoices("user", "user_id", "annotator_id", "worker"))
    prompt: TurnsOfRow = Field(validation_alias=AliasChoices("prompt", "context"))
    chosen: TurnsOfRow
    rejected: TurnsOfRow
    conversation: OptionalId = Field(
        None, validation_alias=AliasChoices("conversation", "conversation_id")
    )
    language: OptionalText = None
    split: Annotated[
        Literal["train", "validation", "test"] | None, BeforeValidator(split_called)
    ] = None

    def answers(self) -> tuple[Turns, Turns]:
        """The chosen and the rejected answer, without the messages of the prompt."""
        return without_messages(self.prompt, self.chosen), without_messages(
            self.prompt, self.rejected
        )

    @pydantic.model_validator(mode="after")
    def check_roles(self) -> Self:
        """Raise ValueError unless the assistant answers the prompt."""
        if isinstance(self.prompt, list) and self.prompt[-1]["role"] == "assistant":
            raise ValueError("the prompt ends with an assistant's message, which is no question")
        for answer in self.answers():
            if not answer:  # such a row is left out later
                continue
            messages = as_messages("assistant", answer)
            if not messages[0]["role"] == messages[-1]["role"] == "assistant":
                raise ValueError("an answer must begin and end with an assistant's message")
        return self

    def comparisons(self) -> Iterator[Comparison | LeftOut]:
        chosen, rejected = self.answers()
        yield Comparison(
            self.user,
            self.prompt,
            chosen,
            rejected,
            conversation=self.conversation,
            language=self.language,
            split=self.split,
        )


class PersonalRewardBenchRow(OwnRow):
    """A row of PersonalRewardBench: the messages before, and one message for each answer."""

    dataset = "PersonalRewardBench"
    telltale = {"user_id", "chosen", "rejected"}
    all_users_are_seen = True


TURNS = ("first", "second", "third", "fourth")
RESPONSES = ("response_a", "response_b", "response_c", "response_d")
OptionalResponse = Annotated[Literal[*RESPONSES] | None, BeforeValidator(none_if_blank)]
END_OF_TEXT = "<|end_of_text|>"

# Such as first_turn_prompt: may be missing or null, as not every conversation has four turns
TurnColumns = pydantic.create_model(
    "TurnColumns",
    __base__=Row,
    **{
        f"{turn}_turn_{part}": (OptionalText, None)
        for turn in TURNS
        for part in ("prompt", *RESPONSES)
    },
    **{f"{turn}_turn_preferred_response": (OptionalResponse, None) for turn in TURNS},
)


class CommunityAlignmentRow(TurnColumns):
    """A conversation of up to four turns, in each of which one of four responses was preferred."""

    dataset = "facebook/community-alignment-dataset"
    telltale = {"annotator_id", "first_turn_prompt", "first_turn_preferred_response"}
    full_size = 90_256

    conversation_id: Id
    annotator_id: Id
    assigned_lang: OptionalText = None

    def comparisons(self) -> Iterator[Comparison | LeftOut]:
        """In each turn the preferred response against each of the others.

        The prompt of a turn holds the turns before it with their preferred responses. So a turn
        without a prompt or a preferred response ends the conversation.
        """
        history: list[dict[str, str]] = []
        for number, turn in enumerate(TURNS):
            question = self.text_of(turn, "prompt")
            if not question:
                if any(self.text_of(later, "prompt") for later in TURNS[number:]):
                    yield LeftOut(EMPTY_TURN)
                return
            preferred = getattr(self, f"{turn}_turn_preferred_response")
            chosen = self.text_of(turn, preferred) if preferred else ""
            if not chosen:
                yield LeftOut(NO_PREFERENCE)
                return
            prompt = [*history, {"role": "user", "content": question}]
            for response in RESPONSES:
                rejected = self.text_of(turn, response)
                if response != preferred and rejected:
                    yield Comparison(
                        self.annotator_id,
                        prompt,
                        chosen,
                        rejected,
                        conversation=self.conversation_id,
                        language=self.assigned_lang,
                    )
            history = [*prompt, {"role": "assistant", "content": chosen}]

    def text_of(self, turn: str, part: str) -> str:
        """A text of a turn, without the model's end mark; "" if there is none."""
        text = getattr(self, f"{turn}_turn_{part}") or ""
        return text.removesuffix(END_OF_TEXT).rstrip() if text.strip() else ""


A_IS_BETTER = ("A-is-clearly-better", "A-is-slightly-better")
B_IS_BETTER = ("B-is-clearly-better", "B-is-slightly-better")
NEITHER_IS_BETTER = "Tie"
Preference = Literal[*A_IS_BETTER, NEITHER_IS_BETTER, *B_IS_BETTER]


class Annotation(BaseModel):
    """What one annotator says of the two completions of a row of MultiPref."""

    evaluator: Id
    overall_pref: Annotated[Preference | None, BeforeValidator(none_if_blank)] = None


class MultiPrefRow(Row):
    """Two completions of a text, and what several annotators think of them."""

    dataset = "allenai/multipref"
    telltale = {"completion_a", "completion_b", "normal_worker_annotations"}
    full_size = 10_461

    text: OptionalText
    completion_a: OptionalText
    completion_b: OptionalText
    normal_worker_annotations: list[Annotation] | None = None
    expert_worker_annotations: list[Annotation] | None = None

    def comparisons(self) -> Iterator[Comparison | LeftOut]:
        """A comparison for each annotator who prefers one of the completions."""
        normal = self.normal_worker_annotations or []
        expert = self.expert_worker_annotations or []
        for annotation in normal + expert:
            preferred = annotation.overall_pref
            if preferred is None:
                yield LeftOut(NO_OPINION)
            elif preferred == NEITHER_IS_BETTER:
                yield LeftOut(TIE)
            elif preferred in A_IS_BETTER:
                yield Comparison(
                    annotation.evaluator, self.text, self.completion_a, self.completion_b
                )
            elif preferred in B_IS_BETTER:
                yield Comparison(
                    annotation.evaluator, self.text, self.completion_b, self.completion_a
                )


KINDS = (CommunityAlignmentRow, MultiPrefRow, OwnRow)
PUBLIC = {  # data sets of the hub that prepare.py takes by name
    "facebook/community-alignment-dataset": CommunityAlignmentRow,
    "allenai/multipref": MultiPrefRow,
    "MichaelR207/prism_personalized_0125": PersonalRewardBenchRow,
    "MichaelR207/chatbot_arena_personalized_0125": PersonalRewardBenchRow,
}
