"""All entries of the field, in the order of the table."""

from benchmarks.field import files, images, sounds, texts
from benchmarks.field.entry import Entry

ENTRIES: dict[str, Entry] = {**images.ENTRIES, **sounds.ENTRIES, **texts.ENTRIES, **files.ENTRIES}
