"""The shapes of a trajectory's parts in normal form, and what is used of Gemma 4's processor and tokenizer."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, TypeAlias, TypedDict

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

# What `json` makes of a JSON text.
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = dict[str, Json]

# A row as a file holds it: nothing about it has been checked, and parquet brings bytes.
RawRow: TypeAlias = dict[str, object]


class ArrowStruct(dict[str, object]):
    """An object that was a struct in Arrow, which gives it all keys of its column: null may stand for no key at all."""


class TextObject(dict[str, object]):
    """An object that a string of the row holds as JSON text: every null in it is the row's own."""


class RowWithFiles(dict[str, object]):
    """A row that came with files, which it names as others name paths."""

    def __init__(self, row: RawRow, files: "Mapping[str, bytes]") -> None:
        super().__init__(row)
        self.files = files


# What makes a string of a row safe to render, or raises DataError.
Clean: TypeAlias = Callable[[str], str]


class TextPart(TypedDict):
    """A string in a message's content."""

    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    """Where an image stands in a message's content; its file is in `Trajectory.images`."""

    type: Literal["image"]


Part: TypeAlias = TextPart | ImagePart
Content: TypeAlias = str | list[Part]


class CalledFunction(TypedDict):
    """Which tool a call wants, and with what."""

    name: str
    arguments: JsonObject
    acceptable: NotRequired[dict[str, list[Json]]]  # of gold: what else is right (`gold.py`)
    ignore_arguments: NotRequired[list[str]]  # of gold: what is not judged


class ToolCall(TypedDict):
    """A call in an assistant message."""

    id: str  # unique in its message; "" until `link_answers` gives one to a call that came without
    type: Literal["function"]
    function: CalledFunction


class Message(TypedDict):
    """A message of a trajectory. What is absent has no key: no value is None."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Content
    tool_calls: NotRequired[list[ToolCall]]  # of an assistant, at least one
    reasoning_content: NotRequired[str]  # of an assistant
    train: NotRequired[Literal[False]]  # of an assistant that is kept out of the loss
    tool_call_id: NotRequired[str]  # of a tool: the call that it answers
    name: NotRequired[str]  # of a tool: the function of that call


class Function(TypedDict):
    """The declaration of a tool: its JSON schema, as given, is checked but not changed."""

    name: str
    description: str
    parameters: NotRequired[JsonObject]


class Tool(TypedDict):
    """An entry of a row's `tools`."""

    type: Literal["function"]
    function: Function


class Encoding(Protocol):
    """What `tokenizers` gives for a string of T tokens."""

    ids: list[int]  # (T,)
    offsets: list[tuple[int, int]]  # (T,): [start, end) in characters


class BackendTokenizer(Protocol):
    """The `tokenizers.Tokenizer` inside of a fast tokenizer."""

    normalizer: Any
    pre_tokenizer: Any
    decoder: Any
    post_processor: Any
    model: Any
    encode_special_tokens: bool

    def get_added_tokens_decoder(self) -> Mapping[int, Any]:
        """Each `tokenizers.AddedToken` by its id."""

    def get_vocab(self) -> dict[str, int]:
        """The id of each token, the added ones among them."""

    def to_str(self) -> str:
        """Everything that it does, as JSON."""

    def encode(self, sequence: str, *, add_special_tokens: bool) -> Encoding:
        """Tokens of a string, with the padding and truncation of the last call that asked for any."""

    def encode_batch_fast(self, sequences: list[str], *, add_special_tokens: bool) -> list[Encoding]:
        """As `encode` of each, without saying where in the string a token stands."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        """The string of token ids."""

    def id_to_token(self, token: int) -> str:
        """A token as the vocabulary has it."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary."""

    def no_padding(self) -> None:
        """Stop padding."""

    def no_truncation(self) -> None:
        """Stop truncating."""


class Tokenizer(Protocol):
    """What is used of a fast tokenizer of transformers."""

    backend_tokenizer: BackendTokenizer
    bos_token_id: int
    pad_token_id: int
    special_tokens_map: dict[str, str]  # bos_token, eos_token …

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, list[int]]:
        """`input_ids` (T,) of a string."""

    def decode(self, token_ids: list[int]) -> str:
        """The string of token ids, control tokens kept."""

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        """The id of each token."""


class SoftTokenCounts(Protocol):
    """What a processor says about images before it has their pixels."""

    num_image_tokens: list[int]  # of each image


class ImageProcessor(Protocol):
    """What is used of Gemma 4's image processor."""

    def __call__(self, *, images: "list[Image]", return_tensors: str) -> "Mapping[str, torch.Tensor]":
        """Pixels and positions of the patches of N images."""

    def to_dict(self) -> dict[str, object]:
        """Its settings."""


class Processor(Protocol):
    """What is used of a `Gemma4Processor`."""

    tokenizer: Tokenizer
    image_processor: ImageProcessor
    chat_template: str
    image_token_id: int
    boi_token: str
    eoi_token: str

    def _get_num_multimodal_tokens(self, *, image_sizes: list[tuple[int, int]]) -> SoftTokenCounts:
        """The soft tokens of images of (height, width) pixels. ValueError where one cannot be made into patches."""
