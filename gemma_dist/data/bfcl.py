"""Rows of the Berkeley Function Calling Leaderboard (BFCL), of one turn, as test cases.

    BFCL_v4_simple_python.json                    {"id": "simple_python_0", "question": [[{"role": "user", …}]],
                                                   "function": [{"name": "f", "parameters": {"type": "dict", …}}]}
    possible_answer/BFCL_v4_simple_python.json    {"id": "simple_python_0", "ground_truth": [{"f": {"a": [1, ""]}}]}

The answers lie in a file of their own, of the same name in `possible_answer/`, as in BFCL's folder; a row that holds
its `ground_truth` itself is taken, too. The category is what stands in front of the number of an id. Rows of
irrelevance expect no call, those of relevance any call at all. What needs more than a look at one answer is refused:
several turns, memory and search (programs are run), Java and JavaScript (arguments are source text of these languages).
"""

from collections.abc import Iterator
from pathlib import Path

from gemma_dist.data.places import ANY_SIZE, ReadRow
from gemma_dist.data.rows import read_rows
from gemma_dist.data.strict import is_list_of, short
from gemma_dist.data.types import RawRow
from gemma_dist.errors import DataError

ANSWERS = "possible_answer"
TAKEN = (
    *("simple", "simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance"),
)


def is_row(row: RawRow) -> bool:
    """Whether the row is one of BFCL's."""
    is_question = isinstance(row.get("question"), (str, list)) and isinstance(row.get("function"), (list, dict))
    return is_question and not any(row.get(key) for key in ("messages", "conversations", "answer", "answers"))


def as_test_case(row: RawRow) -> RawRow:
    """The row as a test case of ours (`expected.py`).

    Raises:
        DataError: it is of a category that is not taken, or has no answers.
    """
    category = str(row.get("id")).rpartition("_")[0]
    if category not in TAKEN:
        raise DataError(
            f"the row is of BFCL's category {short(category)}, by its id {short(row.get('id'))}; taken are those of "
            f"one turn whose arguments are JSON: {', '.join(TAKEN)}"
        )
    case: RawRow = {"id": row["id"], "category": category, "messages": _messages(row["question"])}
    functions = row["function"] if isinstance(row["function"], list) else [row["function"]]
    case["tools"] = [{"type": "function", "function": function} for function in functions]
    if category.endswith("irrelevance"):
        return {**case, "expected_tool": "none"}
    if category.endswith("relevance"):
        return {**case, "expected_tool": "*"}
    if row.get("ground_truth") is None:
        raise DataError(
            "the row is a question of BFCL, a test case for `evaluate`, without `ground_truth`; put the file of its "
            f"answers beside it, in {ANSWERS}/ under the same name, or write the answers into the row"
        )
    return {**case, "expected_calls": [_expected(call) for call in _list(row["ground_truth"], "ground_truth")]}


def read_with_answers(path: Path, max_row_bytes: int = ANY_SIZE) -> Iterator[ReadRow]:
    """The rows of a file as `read_rows` gives them, each with its answers where these lie in a file beside it.

    Raises:
        DataError: as `read_rows`, also of the file of answers.
    """
    beside = path.parent / ANSWERS / path.name
    answers: dict[object, object] = {}
    if beside.is_file():
        for where, answer in read_rows([beside], max_row_bytes):
            if isinstance(answer, DataError):
                raise answer
            if answer.get("ground_truth") is None:
                raise DataError(f"{where}: the answer has no `ground_truth`; restore the file")
            answers[answer.get("id")] = answer["ground_truth"]
    for where, row in read_rows([path], max_row_bytes):
        if not isinstance(row, DataError) and row.get("id") in answers and "ground_truth" not in row:
            row = {**row, "ground_truth": answers[row.get("id")]}
        yield where, row


def _messages(question: object) -> list[object]:
    """The messages of the only turn: [[{"role": "user", …}]] -> [{"role": "user", …}]."""
    if isinstance(question, str):
        return [{"role": "user", "content": question}]
    turns = _list(question, "question")
    if is_list_of(turns, dict):
        return turns
    if len(turns) != 1:
        raise DataError(f"`question` has {len(turns)} turns; rows of one turn are taken")
    return _list(turns[0], "question")


def _expected(call: object) -> RawRow:
    """An expected call: {"f": {"a": [1, ""]}} -> {"name": "f", "arguments": {"a": [1, ""]}}."""
    if not isinstance(call, dict) or len(call) != 1:
        raise DataError(
            f'`ground_truth` holds {short(call)}; write {{"name of the function": {{"argument": [values]}}}}'
        )
    ((name, arguments),) = call.items()
    return {"name": name, "arguments": arguments}


def _list(value: object, name: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise DataError(f"`{name}` is {short(value)}; write a list that is not empty")
    return value
