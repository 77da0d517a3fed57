"""The three verbs of the command timing tests: probe, issue, assert_earliest_ready_at. All times are clocks."""

from typing import Any

from firsttoken_compiler.target.dram_presets import dram_device
from firsttoken_simulator.units import dram_commands as commands


class CommandBench:
    """One channel's device, driven command by command, without a controller."""

    def __init__(self, name: str, **changes: Any) -> None:
        self.dram, self.commands = dram_device(name, **changes)
        self.device = commands.new_device(self.dram, self.commands)

    def bank(self, group: int = 0, bank: int = 0, rank: int = 0) -> int:
        """The number of a bank."""
        return (rank * self.dram.bank_groups + group) * self.dram.banks_per_group + bank

    def probe(self, command: int, bank: int, clock: int) -> bool:
        """Whether `command` may be issued at `clock`; changes nothing."""
        return int(commands.earliest.py_func(self.device, command, bank)) <= clock

    def issue(self, command: int, bank: int, clock: int, row: int = 0) -> None:
        """Issues `command`; raises where a rule forbids it."""
        if not self.probe(command, bank, clock):
            first = int(commands.earliest.py_func(self.device, command, bank))
            raise AssertionError(f"{commands.NAMES[command]} to bank {bank} at {clock}: not before {first}")
        commands.issue.py_func(self.device, command, bank, row, clock)

    def assert_earliest_ready_at(self, command: int, bank: int, clock: int) -> None:
        """`command` may not be issued at `clock` - 1, and may at `clock`."""
        name = commands.NAMES[command]
        assert not self.probe(command, bank, clock - 1), f"{name} to bank {bank} is ready before {clock}"
        assert self.probe(command, bank, clock), f"{name} to bank {bank} is not ready at {clock}"
