"""Counts in words."""


def count_of(count: int, one: str, many: str | None = None) -> str:
    """Such as "1 user" and "1,200 users"; many: what else than an s follows another number than 1.

    The words may go on: count_of(n, "user is", "users are").
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def unseen_users(count: int, everybody_is_seen: bool) -> str:
    """Such as `20 unseen users`; only `20 users` if the training has seen them."""
    return count_of(count, "user" if everybody_is_seen else "unseen user")
