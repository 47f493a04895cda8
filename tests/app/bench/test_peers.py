"""Driving llama-server: the real one if EDGESPEC_LLAMA_SERVER names it, and peers that misbehave."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from peer_servers import SERVER, needs_server, peer

from edgespec.app.bench.measure import first_difference
from edgespec.app.bench.peers import MODES, LlamaServer, choose_modes, parse_peer
from edgespec.app.bench.systems import UNKNOWN, EdgespecSystem
from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.engine import Engine
from edgespec.core import EdgespecError
from edgespec.models.gguf.model import LlamaOptions


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(b"x" * 1000)
    return tmp_path / "model.gguf"


def servers() -> set[int]:
    """The child processes of this process."""
    command = ["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())]
    listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return {int(pid) for pid, name in map(str.split, listed) if name in ("peer", "llama-server")}


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch):
    """No test leaves a process or a temporary folder of a server behind."""
    with TemporaryDirectory() as folder:  # `tmp_path` can be too long for a socket in it
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield
        assert not servers()
        assert list(Path(folder).iterdir()) == []


def raises(server: LlamaServer, *words: str) -> None:
    """`server` fails to start or to answer, with an error of one line that contains these words."""
    try:
        with pytest.raises(EdgespecError) as caught:  # noqa: PT012 - whichever of the two it is
            server.start()
            server.ask([1, 2, 3], 4)
        assert "\n" not in str(caught.value)
        for word in (server.name, *words):
            assert word in str(caught.value)
    finally:
        server.stop()


# --- a peer that behaves ---


@pytest.mark.parametrize("tcp", [False, True])
def test_an_answer_is_read_from_the_stream(tmp_path, model, tcp):
    server = LlamaServer(peer(tmp_path), "plain", model, tcp=tcp)
    server.start()
    try:
        answer = server.ask([1, 2, 3], 4)
        again = server.ask([1, 2, 3], 4)
    finally:
        server.stop()
    assert server.build == "b1"
    assert answer.prompt == (1, 2, 3)
    assert (
        answer.tokens == again.tokens == (5, UNKNOWN, 7)
    )  # the end is not part of it; one id was not reported
    assert answer.written == 4
    assert (answer.drafted, answer.accepted, answer.rounds) == (3, 2, 2)
    assert 0 < answer.seconds_to_first_token < answer.seconds - 0.15
    assert answer.tokens_per_second == pytest.approx(3 / (answer.seconds - answer.seconds_to_first_token))
    assert answer.tokens_per_second < 20


def test_what_is_asked(tmp_path, model):
    echo = """\
    self.begin()
    expected = {"prompt": [1, 2, 3], "n_predict": 4, "temperature": 0.0, "cache_prompt": False,
                "stream": True, "ignore_eos": False, "return_tokens": True}
    self.event(tokens=[int(asked == expected)], tokens_predicted=1, stop=False)
    self.final(1)
    """
    server = LlamaServer(peer(tmp_path, echo), "plain", model)
    server.start()
    try:
        assert server.ask([1, 2, 3], 4).tokens == (1,)
    finally:
        server.stop()


def test_the_environment_sets_no_options(tmp_path, model, monkeypatch):
    monkeypatch.setenv("LLAMA_ARG_N_PREDICT", "1")
    main = "import os; sys.exit(3 if any(name.startswith('LLAMA_ARG_') for name in os.environ) else serve())"
    server = LlamaServer(peer(tmp_path, main=main), "plain", model)
    server.start()
    server.stop()


def test_starting_twice_leaves_one_process(tmp_path, model):
    server = LlamaServer(peer(tmp_path), "plain", model)
    server.start()
    server.start()
    try:
        assert len(servers()) == 1
    finally:
        server.stop()
        server.stop()


def test_a_peer_deaf_to_sigterm_is_killed(tmp_path, model, monkeypatch):
    main = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); serve()"
    monkeypatch.setattr("edgespec.app.bench.peers.STOP_SECONDS", 0.3)
    server = LlamaServer(peer(tmp_path, main=main), "plain", model)
    server.start()
    server.stop()


# --- peers that do not ---


def test_not_a_program(tmp_path, model):
    text = tmp_path / "peer"
    text.write_bytes(b"\x7fELF and no more")
    text.chmod(0o755)
    with pytest.raises(EdgespecError, match="cannot start"):
        LlamaServer(text, "plain", model).start()


def test_it_dies_at_the_start(tmp_path, model):
    main = "print('error: invalid argument: --cache-ram'); print('usage: peer'); sys.exit(3)"
    raises(LlamaServer(peer(tmp_path, main=main), "plain", model), "code 3", "invalid argument: --cache-ram")


def test_it_never_listens(tmp_path, model):
    main = "print('loading', flush=True); time.sleep(60)"
    raises(LlamaServer(peer(tmp_path, main=main), "plain", model, patience=0.5), "silent", "loading")


def test_it_never_answers(tmp_path, model):
    server = LlamaServer(peer(tmp_path, "time.sleep(60)"), "plain", model, patience=1.0)
    raises(server, "silent for 1 seconds")


def test_it_refuses(tmp_path, model):
    refusal = 'self.whole(400, {"error": {"code": 400, "message": "the prompt is\\ntoo long"}})'
    raises(LlamaServer(peer(tmp_path, refusal), "plain", model), "refused: the prompt is too long")


def test_it_refuses_in_the_stream(tmp_path, model):
    refusal = """\
    self.begin()
    self.send(b'error: {"message": "out of context"}\\n\\n')
    """
    raises(LlamaServer(peer(tmp_path, refusal), "plain", model), "refused: out of context")


@pytest.mark.parametrize(
    "stream",
    [
        b"data: <html>\n\n",
        b"data: []\n\n",
        b"data: 3\n\n",
        b'data: {"tokens": [1]}\n\n',
        b'data: {"tokens": "abc", "tokens_predicted": 1, "stop": false}\n\n',
        b'data: {"tokens": null, "tokens_predicted": 1, "stop": false}\n\n',
        b'data: {"tokens": [1], "tokens_predicted": 1, "stop": true}\n\n',
        b'data: {"tokens": [1], "tokens_predicted": 1, "stop": true, "tokens_evaluated": 3, "timings": 7}\n',
        b"data: \xff\xfe\n\n",
    ],
)
def test_garbage_in_the_stream(tmp_path, model, stream):
    answer = f"self.begin()\nself.send({stream!r})\nself.send(b'')\n"
    raises(LlamaServer(peer(tmp_path, answer), "plain", model), "not llama-server's")


@pytest.mark.parametrize(
    "ending", ["self.send(b'')", "self.close_connection = True", "import os; os._exit(9)"]
)
def test_the_answer_breaks_off(tmp_path, model, ending):
    answer = f"self.begin()\nself.event(tokens=[5], tokens_predicted=1, stop=False)\n{ending}\n"
    words = ["ended with code 9"] if "_exit" in ending else ["broke off"]
    raises(LlamaServer(peer(tmp_path, answer), "plain", model), *words)


@pytest.mark.parametrize(
    ("final", "words"),
    [("tokens_evaluated=2", ["counted 2"]), ("timings={'cache_n': 2}", ["took 2 from its cache"])],
)
def test_an_unfair_answer_is_refused(tmp_path, model, final, words):
    answer = f"self.begin()\nself.event(tokens=[5], tokens_predicted=1, stop=False)\nself.final(1, {final})\n"
    raises(LlamaServer(peer(tmp_path, answer), "plain", model), *words)


def test_another_program_on_the_port(tmp_path, model):
    main = "sys.argv[-2:] = []; print('cannot bind: failed'); sys.exit(1)"
    raises(LlamaServer(peer(tmp_path, main=main), "plain", model, tcp=True), "code 1", "cannot bind")


def test_ctrl_c_while_it_loads(tmp_path, model):
    main = "import os, signal; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        LlamaServer(peer(tmp_path, main=main), "plain", model).start()


# --- options ---


def test_modes():
    assert choose_modes("usual", has_draft=True) == ["plain", "draft-simple", "ngram-simple", "ngram-mod"]
    assert choose_modes("usual", has_draft=False) == ["plain", "ngram-simple", "ngram-mod"]
    assert choose_modes("all", has_draft=True) == list(MODES)
    assert choose_modes("ngram-mod, plain,ngram-mod", has_draft=False) == ["plain", "ngram-mod"]
    with pytest.raises(EdgespecError, match=r"'eagle'.*ngram-mod"):
        choose_modes("eagle", has_draft=True)
    with pytest.raises(EdgespecError, match="--draft"):
        choose_modes("draft-simple", has_draft=False)


@pytest.mark.parametrize(
    ("text", "word"),
    [("llama-server", "llama-server=PATH"), ("ollama=/bin/true", "llama-server=PATH"),
     ("llama-server=/nowhere/x", "no file"), ("llama-server=/etc/passwd", "not executable")],
)  # fmt: skip
def test_a_peer_that_is_not_there(text, word):
    if "passwd" in text and os.geteuid() == 0 and os.access("/etc/passwd", os.X_OK):
        pytest.skip("everything may be run here")
    with pytest.raises(EdgespecError, match=word):
        parse_peer(text)


def test_memory_and_flags(tmp_path, model):
    draft = tmp_path / "draft.gguf"
    draft.write_bytes(b"y" * 500)
    plain = LlamaServer(tmp_path / "x", "plain", model, draft, cache_bytes=7, threads=(2, 3))
    drafting = LlamaServer(tmp_path / "x", "draft-simple", model, draft, cache_bytes=7, threads=(2, 3))
    assert plain.memory > 1007
    assert drafting.memory - plain.memory > 500
    assert "-md" not in plain.command
    assert drafting.command[-6:] == ["-md", str(draft), "-td", "2", "-tbd", "3"]
    assert (plain.plain, drafting.plain) == (plain.name, plain.name)
    assert not plain.remembers
    assert LlamaServer(tmp_path / "x", "ngram-mod", model).remembers


# --- the real one ---


@pytest.fixture(scope="module")
def one_thread(starter_path: Path) -> Iterator[Engine]:
    """With one thread neither side waits at a barrier for a core that is busy."""
    with open_engine(starter_path, options=LlamaOptions(context=1024, threads=1)) as engine:
        yield engine


@needs_server
@pytest.mark.parametrize("tcp", [False, True])
def test_the_real_server_says_what_the_engine_says(one_thread, starter_path, tcp):
    text = "Write the word sea three times, then 🦊."
    prompt = one_thread.chat_prompt([{"role": "user", "content": text}])
    ours = EdgespecSystem(one_thread, "edgespec", speculate=False).ask(prompt, 16)
    server = LlamaServer(Path(SERVER), "plain", starter_path, context=1024, tcp=tcp)
    server.start()
    try:
        theirs = server.ask(prompt, 16)
    finally:
        server.stop()
    assert first_difference(ours.tokens, theirs.tokens) is None
    assert (ours.prompt, ours.written, ours.rounds) == (theirs.prompt, theirs.written, theirs.rounds)
    assert theirs.drafted == 0
    assert 0 < theirs.seconds_to_first_token < theirs.seconds


@needs_server
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_the_real_server_runs_and_really_speculates(one_thread, starter_path, mode):
    """The model drafts for itself, and goes on repeating a sentence as long as the longest n-gram's draft."""
    sentence = "The cat sat on the mat and looked at the sea, where seven ships sailed slowly home."
    prompt = one_thread.model.vocab.tokenize("\n".join([sentence] * 8 + ["The cat"]))
    server = LlamaServer(Path(SERVER), mode, starter_path, starter_path, context=1024)
    server.start()
    try:
        answer = server.ask(prompt, 100)
    finally:
        server.stop()
    assert answer.written == 100
    assert (answer.drafted > 0) == (mode != "plain")
    assert answer.accepted <= answer.drafted
    assert answer.rounds + answer.accepted == 100


@needs_server
def test_an_idle_server_leaves_the_processor_alone(starter_path):
    server = LlamaServer(Path(SERVER), "plain", starter_path, context=512, threads=(2, 2))
    server.start()
    try:
        server.ask([1, 2, 3], 2)
        time.sleep(0.5)

        def spent() -> float:
            fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before = spent()
        time.sleep(1.0)
        assert spent() - before < 0.1
    finally:
        server.stop()


@needs_server
def test_the_real_server_says_why_it_cannot_start(tmp_path):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(100))
    raises(LlamaServer(Path(SERVER), "plain", damaged), "ended with code 1", "its log:")
