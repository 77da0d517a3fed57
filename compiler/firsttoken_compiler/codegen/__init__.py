"""From scheduled TIR to a program: instructions, scratchpad, synchronisation, verification."""
