"""`lowmem-icl measure`: this machine's rates, shown and written to a file."""

from pathlib import Path

from lowmem_icl.cli.terminal import Terminal, count, size
from lowmem_icl.conversion.locate import plan_store
from lowmem_icl.options import RunOptions
from lowmem_icl.planning.machine_file import MachineFile, measured_machine, write_machine
from lowmem_icl.session.prepare import find_model
from lowmem_icl.system.files import try_writing


def measure_machine(options: RunOptions, out: Path | None, terminal: Terminal) -> MachineFile:
    """Measure this machine with the model of some options; write it where a file is given."""
    if out is not None:
        try_writing(out.parent)
    store = plan_store(find_model(options, terminal.progress), options.weights)
    machine = measured_machine(store, options)
    if out is not None:
        write_machine(out, machine)
    return machine


def show_machine(machine: MachineFile, terminal: Terminal) -> None:
    """Print what was measured."""
    layer = {
        "attention": machine.attention_products_per_second,
        "output projection": machine.projection_products_per_second,
        "FFN": machine.ffn_products_per_second,
        "vocabulary": machine.vocabulary_products_per_second,
        "back": machine.backward_products_per_second,
    }
    terminal.out.print(f"measured with {machine.model}, weights in {machine.weights}", soft_wrap=True)
    for name, rate in layer.items():
        terminal.out.print(f"{name}: {count(rate)} products/s")
    terminal.out.print(f"disk: {size(machine.disk_bytes_per_second)}/s")
    gpu = machine.device_memory_bytes
    terminal.out.print(f"memory: {size(machine.memory_bytes)}" + (f", GPU {size(gpu)}" if gpu else ""))
