"""What it takes to read a data set of Community Alignment's size, without embedding it.

    python tests/benchmarks/bench_own_data.py           a made copy of full size, 90,256 rows
    python tests/benchmarks/bench_own_data.py 9000      a smaller one

Makes a parquet file in the data set's schema: conversations of one to four turns, four responses a
turn, texts of random words. Then, in a process of its own, goes through OwnData/prepare.py up to
the embedding, and prints for each step the seconds of one core, and the largest memory so far
beyond that of the imports.

Measured at full size, 0.92 GB of text, 676,047 comparisons (Python 3.11, an AMD EPYC):

    read                                             17.4 s     1.64 GB
    group                                             1.2 s     1.64 GB
    split                                             2.1 s     1.64 GB
    conversations                                     9.3 s     2.21 GB
    digest                                           10.3 s     2.21 GB
    equal conversations, as embedding looks          12.6 s     2.83 GB
    notes on what is odd                             16.8 s     2.83 GB
"""

import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "OwnData")]
import own_files
import own_reading
import own_rows
import own_split
from lore.conversations import group_equal
from lore.data_notes import notes_on_comparisons

# ---- Settings
ROWS = 90_256
USERS = 3_200
OPENINGS = 20_000  # several people were given one opening
PROMPT_WORDS = (8, 40)
RESPONSE_WORDS = (60, 160)
VOCABULARY = 5_000
ROWS_AT_ONCE = 2_000


def words(rng: random.Random, vocabulary: list[str], count: tuple[int, int]) -> str:
    """So many random words."""
    return " ".join(rng.choices(vocabulary, k=rng.randint(*count)))


def made_row(rng: random.Random, vocabulary: list[str], openings: list[str], number: int) -> dict:
    """A conversation in the schema of Community Alignment."""
    row: dict[str, Any] = {
        "conversation_id": f"c{number}",
        "annotator_id": f"a{rng.randrange(USERS)}",
        "assigned_lang": rng.choice(["en", "fr", "it", "pt", "hi"]),
        "annotator_age": rng.choice(["18-30", "31-45", "46-60"]),
    }
    turns = rng.randint(1, len(own_rows.TURNS))
    for place, turn in enumerate(own_rows.TURNS):
        is_there = place < turns
        prompt = rng.choice(openings) if place == 0 else words(rng, vocabulary, PROMPT_WORDS)
        row[f"{turn}_turn_prompt"] = prompt if is_there else None
        for response in own_rows.RESPONSES:
            text = words(rng, vocabulary, RESPONSE_WORDS) if is_there else None
            row[f"{turn}_turn_{response}"] = text
        preferred = rng.choice(own_rows.RESPONSES) if is_there else None
        row[f"{turn}_turn_preferred_response"] = preferred
    return row


def make_copy(path: Path, rows: int) -> int:
    """Write so many conversations -> the bytes of all their texts."""
    rng = random.Random(0)
    vocabulary = [f"word{number}" for number in range(VOCABULARY)]
    openings = [words(rng, vocabulary, PROMPT_WORDS) for _ in range(OPENINGS)]
    first = made_row(rng, vocabulary, openings, 0)
    schema = pa.schema({name: pa.string() for name in first})
    size = 0
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, ROWS_AT_ONCE):
            numbers = range(start, min(start + ROWS_AT_ONCE, rows))
            table = [made_row(rng, vocabulary, openings, number) for number in numbers]
            size += sum(len(text) for row in table for text in row.values() if text)
            writer.write_table(pa.Table.from_pylist(table, schema))
    return size


def peak() -> float:
    """The largest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def measure(path: Path) -> None:
    """Go through the steps of prepare.py, and print what each takes."""
    at_start = peak()

    def step(name: str, function: Callable, *arguments: Any, **options: Any) -> Any:
        started = time.process_time()
        outcome = function(*arguments, **options)
        seconds = time.process_time() - started
        print(f"{name:45} {seconds:7.1f} s   {peak() - at_start:6.2f} GB")
        return outcome

    reading = step("read", own_reading.read_comparisons, path, about_users=["annotator_*"])
    comparisons = reading.comparisons
    groups = step("group", own_split.group_numbers, comparisons)
    comparisons, _ = step("split", own_split.split_comparisons, comparisons, groups, 0.2, 0)
    step("keep users", own_split.users_to_keep, comparisons, groups, 2)
    reading.comparisons = comparisons
    conversations, _ = step("conversations", own_files.number_conversations, comparisons)
    step("digest", own_files.digest_of_data, comparisons, groups, reading.about_users)
    step("equal conversations, as embedding looks", group_equal, conversations)
    step("notes on what is odd", notes_on_comparisons, own_split.judged_of(comparisons))
    print(
        f"{reading.rows:,} rows, {len(comparisons):,} comparisons, {len(conversations):,} "
        f"conversations, {int(groups.max()) + 1:,} groups"
    )


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.parquet"
        size = make_copy(path, rows)
        print(f"{rows:,} conversations, {size / 1e9:.2f} GB of text")
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(path,))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
