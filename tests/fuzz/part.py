"""What the parts of tests/fuzz share: counting what was tried and what failed."""


class Part:
    """Counts what was tried and what failed, and says so."""

    def __init__(self, name: str) -> None:
        self.name, self.outcomes, self.failures, self.prefix = name, {}, [], ""

    def add(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def fail(self, text: str) -> None:
        self.failures.append(text)
        print(f"{self.name}: FAILED: {text}", flush=True)

    def __str__(self) -> str:
        done = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes.items()))
        return f"{self.name}: {sum(self.outcomes.values())} tried ({done}), {len(self.failures)} failed"
