-- A history of version 1, as it was written then. It stays as it is.
CREATE TABLE conversations (
            id INTEGER PRIMARY KEY AUTOINCREMENT, head INTEGER, pinned INTEGER NOT NULL,
            created REAL NOT NULL, updated REAL NOT NULL, deleted_at REAL, title TEXT NOT NULL,
            model TEXT NOT NULL, persona TEXT NOT NULL, sampling TEXT NOT NULL, system TEXT NOT NULL
        ) STRICT;
CREATE INDEX conversations_shown ON conversations (pinned DESC, updated DESC, id DESC)
            WHERE deleted_at IS NULL;
CREATE TABLE messages (
            id INTEGER PRIMARY KEY AUTOINCREMENT, conversation INTEGER NOT NULL REFERENCES conversations,
            parent INTEGER REFERENCES messages CHECK (parent < id), chosen INTEGER, role TEXT NOT NULL,
            state TEXT NOT NULL, created REAL NOT NULL, stats TEXT NOT NULL, text TEXT NOT NULL,
            sources TEXT NOT NULL
        ) STRICT;
CREATE INDEX messages_siblings ON messages (conversation, parent);
CREATE INDEX messages_children ON messages (parent);
CREATE INDEX messages_partial ON messages (id) WHERE state = 'partial';
CREATE TABLE pieces (
            id INTEGER PRIMARY KEY, message INTEGER NOT NULL REFERENCES messages, text TEXT NOT NULL
        ) STRICT;
CREATE INDEX pieces_message ON pieces (message);
INSERT INTO conversations VALUES
    (1, 3, 0, 1.5, 2.5, NULL, 'What is a café?', 'smol', '', '{}', ''),
    (2, NULL, 1, 1.5, 1.5, NULL, 'Zwei', '', '', '{"seed":7}', 'Kurz.');
INSERT INTO messages VALUES
    (1, 1, NULL, 3, 'user', 'complete', 1.5, '{}', 'What is a café?', '[]'),
    (2, 1, 1, NULL, 'assistant', 'partial', 1.75, '{}', 'It ', '[]'),
    (3, 1, 1, NULL, 'assistant', 'complete', 2.5, '{"tokens":2}', 'A place.', '[["target",[2,6]]]');
INSERT INTO pieces VALUES (1, 2, 'is');
PRAGMA application_id = 1164211056;
PRAGMA user_version = 1;
