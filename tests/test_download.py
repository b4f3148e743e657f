"""Downloads, from a server on this machine."""

import http.server
import io
import json
import threading
import zipfile

import pytest
from test_data import HEADERS, ROWS

from data import download, glue


@pytest.fixture
def server(monkeypatch):
    """Serves what is put into `files`: a body, (body, claimed length), or a status."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            found = files.get(self.path, 404)
            if isinstance(found, int):
                return self.send_error(found)
            body, length = found if isinstance(found, tuple) else (found, len(found))
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    base = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(download, "GLUE", base + "/glue")
    monkeypatch.setattr(download, "SENTEVAL", base + "/senteval")
    monkeypatch.setenv("HF_ENDPOINT", base + "/")
    yield files, asked
    running.shutdown()
    running.server_close()


def zipped(members):
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return raw.getvalue()


def everything_under(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


RTE = {"RTE/train.tsv": HEADERS["rte"] + "\n" + "\n".join(ROWS["rte"] * 10),
       "RTE/dev.tsv": HEADERS["rte"] + "\n" + ROWS["rte"][0]}


def hub(name, kind, *files):
    """What the hub would serve of a model with these files."""
    base = f"/{name}/resolve/main/"
    config = json.dumps({"model_type": kind}).encode()
    return {base + "config.json": config} | {base + file: b"x" * 300 for file in files}


def test_a_glue_task_is_fetched_unpacked_and_not_fetched_again(server, tmp_path):
    files, asked = server
    files["/glue/RTE.zip"] = zipped(RTE)
    for _ in range(2):
        assert download.get("rte", tmp_path) == tmp_path / "glue" / "RTE"
    assert asked == ["/glue/RTE.zip"]
    assert everything_under(tmp_path) == ["glue/RTE/dev.tsv", "glue/RTE/train.tsv"]
    assert len(glue.load("rte", tmp_path / "glue")["train"].labels) == 9


def test_mrpc_is_split_by_glues_list_of_dev_ids(server, tmp_path):
    files, _ = server
    rows = [f'{i % 2}\t{i}\t{100 + i}\tSentence {i} " .\tAnother {i} .' for i in range(12)]
    files["/senteval/msr_paraphrase_train.txt"] = "\r\n".join([HEADERS["mrpc"], *rows]).encode()
    files["/glue/mrpc_dev_ids.tsv"] = b"3\t103\n8\t108\n"
    download.get("MRPC", tmp_path)
    splits = glue.load("mrpc", tmp_path / "glue")
    assert [text[0] for text in splits["test"].texts] == ['Sentence 3 " .', 'Sentence 8 " .']
    assert splits["test"].labels == [1, 0]
    assert len(splits["train"].texts) + len(splits["validation"].texts) == 10


@pytest.mark.parametrize("name, kind, files", [
    ("some-bert", "bert", ["pytorch_model.bin", "vocab.txt"]),  # an older folder
    ("owner/some-bert", "bert", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]),
    ("r", "roberta", ["added_tokens.json", "merges.txt", "model.safetensors",
                      "special_tokens_map.json", "vocab.json"]),
    ("klue/r", "roberta", ["model.safetensors", "vocab.txt"]),
])
def test_a_model_is_fetched_with_the_tokenizer_files_that_it_has(server, tmp_path, name, kind,
                                                                 files):
    server[0].update(hub(name, kind, *files))
    assert everything_under(download.get(name, tmp_path)) == sorted(["config.json", *files])
    assert everything_under(tmp_path / "models" / name) == sorted(["config.json", *files])


def test_model_safetensors_is_preferred_to_pytorch_model_bin(server, tmp_path):
    server[0].update(hub("b", "bert", "vocab.txt", "model.safetensors", "pytorch_model.bin"))
    assert "model.safetensors" in everything_under(download.get("b", tmp_path))
    assert "/b/resolve/main/pytorch_model.bin" not in server[1]


@pytest.mark.parametrize("name, served, words", [
    ("rte", {}, "RTE.zip not found: check the name"),
    ("rte", {"/glue/RTE.zip": 500}, "RTE.zip: HTTP Error 500: .*; check the connection"),
    ("rte", {"/glue/RTE.zip": (zipped(RTE)[:100], len(zipped(RTE)))},
     "RTE.zip: .*got only 100 out of .*; check the connection and run the command again"),
    ("rte", {"/glue/RTE.zip": (zipped(RTE), 100)}, "RTE.zip: BadZipFile"),
    ("rte", {"/glue/RTE.zip": zipped({"../../evil.tsv": "x"})}, "No such file .*RTE"),
    ("mrpc", {"/senteval/msr_paraphrase_train.txt": b"x"}, "mrpc_dev_ids.tsv not found"),
    ("b", {}, "b/resolve/main/config.json not found: check the name"),
    ("b", {"/b/resolve/main/config.json": 401}, "b/resolve/main/config.json not found"),
    ("b", hub("b", "t5"), "config.json: model_type is 't5': use a bert, ro"),
    ("b", {"/b/resolve/main/config.json": b'["bert"]'}, "config.json: AttributeError"),
    ("b", {"/b/resolve/main/config.json": b"[" * 5000},
     "config.json: (RecursionError|JSONDecodeError)"),
    ("b", hub("b", "bert", "model.safetensors"), "b has no tokenizer.json, vocab.txt, or"),
    ("b", hub("b", "roberta", "vocab.json", "model.safetensors"), "b has no tokenizer.json"),
    ("b", hub("b", "bert", "vocab.txt"), "has neither model.safetensors nor pytorch_model.bin"),
    ("b", hub("b", "bert", "vocab.txt") | {"/b/resolve/main/model.safetensors": 403},
     "b has neither .*, or does not give it to everyone"),
    ("b", hub("b", "bert", "vocab.txt") | {"/b/resolve/main/model.safetensors": (b"w" * 50, 90)},
     "model.safetensors: .*got only 50 out of 90 bytes"),
    ("../b", {}, "neither a GLUE task"),
])
def test_what_goes_wrong_is_said_and_nothing_half_is_left(server, tmp_path, name, served, words):
    server[0].update(served)
    with pytest.raises((ValueError, OSError), match=words) as error:
        download.get(name, tmp_path / "data")
    assert everything_under(tmp_path) == [] and "\n" not in str(error.value)


@pytest.mark.parametrize("endpoint", ["file://", "ftp://127.0.0.1", "data:,"])
def test_only_the_web_is_asked(tmp_path, monkeypatch, endpoint):
    folder = tmp_path / "b/resolve/main"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setenv("HF_ENDPOINT", endpoint + str(tmp_path))
    with pytest.raises(OSError, match="begins with neither https:// nor http://"):
        download.get("b", tmp_path / "data")


def test_no_server_is_said_in_one_line_with_exit_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "GLUE", "http://127.0.0.1:9/glue")
    monkeypatch.setattr(download.get, "__defaults__", (tmp_path,))
    with pytest.raises(SystemExit) as stop:
        download.main(["rte"])
    assert stop.value.code == 2 and everything_under(tmp_path) == []
    assert capsys.readouterr().err.count("\n") == 1
