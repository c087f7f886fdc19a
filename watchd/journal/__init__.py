"""The journal: what happened to the layers, in order, on disk.

    format       pure: bytes <-> segment headers and frames (the byte tables are in docs/journal.md)
    disk         all operations on files, in one place
    segments     segment files: names, creation, scanning
    state        what opening must know, carried along record by record
    retention    which of the oldest segments go
    recovery     takes the journal as a crash left it to a journal that can be appended to
    writer       `Journal`: the one writer of a directory, with group commit
    reader       `read` and `Follower`: any number of readers, with or without a writer
    salvage      pure: what can be saved of a damaged segment
    verify       reads everything and says what is damaged
    repair       makes a damaged journal whole again
    cursors      positions as people write them, and named ones
    directories  pure: which directories hold changes
    paths        pure: which paths changed, and how they are now
    index        directories kept in SQLite: one writer, any number of readers
    indexer      the thread that writes it
    changes      what changed since a baseline
    render       records and changes as JSON and as text

Readers and the writer share nothing but the files. Everything above `writer` is plain blocking code.
"""
