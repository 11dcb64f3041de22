"""`gemma-dist chat`: talk to a model in the terminal, and see what training it came to.

    you> How is the weather in Rome?
    → weather {"city": "Rome"}
    run it? y / n / a(lways) y
    ← 21 degrees
    Mild, 21 degrees.

/image PATH shows a picture with the next message, /system TEXT sets the system message, /reset begins again, /save
FILE.jsonl adds the conversation to a file of rows, /quit leaves. A line that ends with a backslash goes on in the next.
Ctrl-C stops an answer; a second one leaves.
"""

import json
import os
from pathlib import Path

from gemma_dist.chat import tools as tool_functions
from gemma_dist.chat.conversation import Conversation
from gemma_dist.chat.screen import BOLD, DIM, RED, Screen
from gemma_dist.chat.tools import Result, Tools, load_tools
from gemma_dist.chat.write import Writer
from gemma_dist.config_chat import ChatConfig
from gemma_dist.data.encode import Encoder, load_encoder
from gemma_dist.data.read import Call, Reading, read_output
from gemma_dist.data.strict import reason
from gemma_dist.errors import ConfigError, DataError
from gemma_dist.files import writing
from gemma_dist.logs import to_json

MOST_ROUNDS = 32  # of calls without a word of the user
MOST_SHOWN = 2000  # characters of a tool's result
COMMANDS = ("/image", "/system", "/reset", "/save", "/quit", "/help")
HELP = "/image PATH, /system TEXT, /reset, /save FILE.jsonl, /quit; //TEXT says /TEXT; a line that ends with \\ goes on"


class _Leave(Exception):
    """The user is done."""


def chat(model: str, adapter: Path | None, tools: str | None, settings: ChatConfig, *, yes: bool) -> None:
    """Talk until the user leaves.

    Args:
        tools: a JSON file of declarations, or MODULE:FUNCTION.
        yes: run functions without asking.

    Raises:
        ConfigError, DataError: the tools cannot be used.
        CheckpointError: the model or the adapter cannot be loaded.
    """
    known = Tools() if tools is None else load_tools(tools)
    if yes and not known.functions:
        raise ConfigError(
            "--yes runs functions without asking, and there are none: name them by --tools MODULE:FUNCTION"
        )
    conversation = Conversation(settings, settings.enable_thinking is True, known.declared)
    encoder = load_encoder(model, settings, adapter=adapter)
    from gemma_dist.model.load import load_for_evaluation  # once all that is typed is known to be right

    writer = Writer(load_for_evaluation(model, adapter), encoder, settings)
    talk = Talk(conversation, known, encoder, writer, Screen(), ask_first=not yes)
    if lost := encoder.lost_opening():
        talk.screen.say(f"note: {lost}", DIM)
    talk.go()


class Talk:
    """A conversation and the terminal that it is held in."""

    def __init__(
        self,
        conversation: Conversation,
        tools: Tools,
        encoder: Encoder,
        writer: Writer,
        screen: Screen,
        *,
        ask_first: bool,
    ) -> None:
        self.conversation, self.tools, self.encoder = conversation, tools, encoder
        self.writer, self.screen = writer, screen
        self._images: list[bytes] = []  # for the next message
        self._asks = dict.fromkeys(tools.functions, ask_first)  # of each tool: whether to ask before it runs
        self._is_leaving = False  # Ctrl-C once more leaves

    def go(self) -> None:
        """Until the user leaves."""
        self.screen.say(HELP, DIM)
        try:
            while True:
                text = self._read("you> ")
                try:
                    self._take(text)
                except (DataError, OSError) as error:
                    self.screen.say(f"error: {reason(error)}", RED)
                except KeyboardInterrupt:
                    self._warn()
        except _Leave:
            pass

    def _warn(self, words: str = "") -> None:
        """The next Ctrl-C leaves."""
        self._is_leaving = True
        self.screen.say(f"{words}Ctrl-C once more leaves", DIM)

    def _read(self, prompt: str) -> str:
        """What is typed, of one line or several."""
        lines: list[str] = []
        while True:
            try:
                line = self.screen.read(prompt)
            except KeyboardInterrupt:
                if self._is_leaving:
                    raise _Leave from None
                lines = []
                self._warn("\n")
                continue
            if line is None:
                raise _Leave
            self._is_leaving = False
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)

    def _take(self, text: str) -> None:
        """Do what a message or a command of the user says."""
        command, _, argument = text.strip().partition(" ")
        argument = argument.strip()
        if not command and not self._images:
            return
        if command == "/quit":
            raise _Leave
        if command == "/image":
            self._images.append(_file(argument))
            self.screen.say(f"shown with the next message ({len(self._images)} in all)", DIM)
        elif command == "/system":
            self.conversation.set_system(argument)
        elif command == "/reset":
            self.conversation.messages.clear()
            self._images.clear()
        elif command == "/save":
            self._save(argument)
        elif command.startswith("/") and not command.startswith("//"):
            known = "" if command in COMMANDS else f"{command} is no command. "
            self.screen.say(known + HELP, DIM)
        else:
            images, self._images = self._images, []
            self.conversation.ask(text.strip().replace("//", "/", 1) if command.startswith("//") else text, images)
            self._answer()

    def _save(self, name: str) -> None:
        if not name:
            raise DataError("name a file: /save FILE.jsonl")
        path = _path(name)
        lines = path.read_bytes().splitlines() if path.exists() else []
        row = self.conversation.row(f"{path.stem}-{len(lines) + 1}")
        with writing(path) as temporary:  # an interrupt leaves all that was saved before
            temporary.write_bytes(b"\n".join([*lines, to_json(row).encode(), b""]))
        self.screen.say(f"saved as row {len(lines) + 1} of {path}", DIM)

    def _answer(self) -> None:
        """Let the model answer, and what it calls, until it calls nothing more."""
        messages = self.conversation.messages
        for _ in range(MOST_ROUNDS):
            before = len(messages)
            try:
                reading = self._one_answer()
                if reading is None or not reading.calls:
                    return
                for number, call in enumerate(reading.calls):
                    self._respond(number, call)
            except BaseException:
                del messages[before:]  # calls without results have no place in a conversation
                raise
        self.screen.say(f"stopped after {MOST_ROUNDS} rounds of calls", RED)

    def _one_answer(self) -> Reading | None:
        """What the model says next, kept in the conversation; None where that is nothing that it can hold."""
        prompt = self.conversation.prompt(self.encoder)
        names = [tool["function"]["name"] for tool in self.conversation.tools]
        shown = _Shown(self.screen, self.conversation)

        def show(text: str) -> None:
            shown.update(read_output(text, prompt.text, tool_names=names))

        answer = self.writer.answer(prompt, show)
        shown.end()
        if answer is None:
            self._warn("stopped: the answer is not kept; ")
            return None
        reading = read_output(answer.text, prompt.text, budget_spent=not answer.stopped, tool_names=names)
        cut_off = "" if answer.stopped else ", cut off at max_new_tokens"
        self.screen.say(f"({len(prompt.input_ids):,} tokens read, {len(answer.ids):,} written{cut_off})", DIM)
        problem = _problem(reading)
        if problem is None:
            try:
                self.conversation.answer(reading, is_whole=answer.stopped)
                return reading
            except DataError as error:
                problem = f"no row could hold it: {error}"
        self.screen.say(f"the answer is not kept: {problem}. It was written as {answer.text}", RED)
        return None

    def _respond(self, number: int, call: Call) -> None:
        """Give the model the result of a call: of the function, or typed by the user."""
        misfit = self.conversation.misfit(call)
        function = self.tools.functions.get(call.name)
        if misfit is not None and self.tools.functions:
            result = Result(f"Error: {misfit}")
        elif function is not None and self._may_run(call):
            result = tool_functions.run(function, call.arguments)
        else:
            result = self._typed_result(call)
        try:
            self.conversation.respond(number, result.text, result.images)
        except DataError as error:
            result = Result(f"Error: {error}")
            self.conversation.respond(number, result.text)
        pictures = f" [{len(result.images)} images]" if result.images else ""
        rest = f" … ({len(result.text):,} characters)" if len(result.text) > MOST_SHOWN else ""
        self.screen.say(f"← {result.text[:MOST_SHOWN]}{rest}{pictures}", DIM)

    def _may_run(self, call: Call) -> bool:
        """Whether the user lets a function run."""
        while self._asks[call.name]:
            said = self._read(f"run {call.name}? y / n / a(lways) ").strip().lower()
            if said in ("a", "always"):
                self._asks[call.name] = False
            elif said in ("y", "yes", "n", "no"):
                return said.startswith("y")
        return True

    def _typed_result(self, call: Call) -> Result:
        """What the user types in a tool's place."""
        images: list[bytes] = []
        while True:
            text = self._read(f"{call.name} answers> ")
            command, _, argument = text.strip().partition(" ")
            if command == "/quit":
                raise _Leave
            if command != "/image":
                return Result(text, tuple(images))
            try:
                images.append(_file(argument.strip()))
            except (DataError, OSError) as error:
                self.screen.say(f"error: {reason(error)}", RED)


def _problem(reading: Reading) -> str | None:
    """Why an answer has no place in a conversation; None: it is a whole call, or text."""
    if reading.attempted:
        return None if reading.status == "ok" else "it holds a call that cannot be read"
    return None if reading.content else "it says nothing"


class _Shown:
    """What of an answer is on the screen already: thoughts, text and calls, as they are read."""

    def __init__(self, screen: Screen, conversation: Conversation) -> None:
        self._screen, self._conversation = screen, conversation
        self._reasoning = self._content = ""
        self._num_calls = 0
        self._line_is_open = False

    def update(self, reading: Reading) -> None:
        """Show what has come since."""
        self._reasoning = self._more(self._reasoning, reading.reasoning, DIM)
        if reading.content and not self._content:
            self.end()  # of the thought
        self._content = self._more(self._content, reading.content, "")
        for call in reading.calls[self._num_calls :]:
            self.end()
            self._screen.say(f"→ {call.name} {json.dumps(call.arguments, ensure_ascii=False)}", BOLD)
            if misfit := self._conversation.misfit(call):
                self._screen.say(f"  does not fit: {misfit}", RED)
        self._num_calls = len(reading.calls)

    def end(self) -> None:
        """End the line."""
        if self._line_is_open:
            self._screen.say("")
        self._line_is_open = False

    def _more(self, before: str, now: str, style: str) -> str:
        if not now.startswith(before):  # what came so far turns out to be something else
            self.end()
            before = ""
        if now != before:
            self._screen.say(now[len(before) :], style, end="")
            self._line_is_open = True
        return now


def _file(name: str) -> bytes:
    """The file of a picture. Raises DataError if it is none, OSError where it cannot be read."""
    from gemma_dist.data.images import decode_image

    if not name:
        raise DataError("name a picture: /image PATH")
    data = _path(name).read_bytes()
    decode_image(data)
    return data


def _path(name: str) -> Path:
    """What is typed as a file's name. Raises DataError where no file can have it."""
    if "\0" in name:
        raise DataError(f"{name!r} is no file's name")
    return Path(os.path.expanduser(name))  # Path's own raises RuntimeError for a user that there is not
