"""What a row says of its own rendering, beside its messages.

{"messages": […], "chat_template_kwargs": {"enable_thinking": true}}
"""

from gemma_dist.data.strict import error_context, is_null, read_json_text, short
from gemma_dist.errors import DataError, setting

# What changes nothing of a whole conversation, where it has this value.
HARMLESS = {"preserve_thinking": (False,), "add_generation_prompt": (False, True), "continue_final_message": (False,)}
REMEDIES = {
    "preserve_thinking": f"to train thoughts of earlier user turns use {setting('unroll', 'reasoning')}, and remove it",
    "thinking": "Gemma's template calls it enable_thinking",
    "documents": "Gemma's template shows none: write them into a message",
}


def parse_template_kwargs(given: object) -> bool | None:
    """`enable_thinking` of a row's `chat_template_kwargs`, an object or its JSON text; None where it says nothing.

    Raises:
        DataError: a key would change the rendering in a way that is not carried out, or a value is no boolean.
    """
    kwargs = {} if given in (None, "") else read_json_text(given, "chat_template_kwargs")
    with error_context("`chat_template_kwargs`"):
        if not isinstance(kwargs, dict):
            raise DataError(f'{short(kwargs)} is no object; write {{"enable_thinking": true}} or false')
        said = {key: value for key, value in kwargs.items() if not _is_empty(value)}
        said.pop("tools", None)  # `declarations.py` reads them
        thinking = said.pop("enable_thinking", None)
        if thinking is not None and not isinstance(thinking, bool):
            raise DataError(f"`enable_thinking` is {short(thinking)}; write true or false, or leave it out")
        for key, value in said.items():
            if value not in HARMLESS.get(key, ()):
                remedy = REMEDIES.get(key, "remove it if the row was made without it")
                raise DataError(f"`{key}` is {short(value)}, but only enable_thinking is carried out; {remedy}")
        return thinking


def _is_empty(value: object) -> bool:
    """Whether a value says no more than an absent key: null, as Arrow fills in, or no text and no entry (smoltalk2).

    {"custom_instructions": "", "enable_thinking": false, "python_tools": [], "xml_tools": []}
    """
    return is_null(value) or (isinstance(value, str) and not value.strip())
