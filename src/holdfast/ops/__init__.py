"""Pure functions on tensors: losses, the ascent engine, statistics, geometry. Nothing here knows a catalogue."""
