"""A replica's work without Ray: units in, committed parts out, whatever the rows are like."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from b2batch.engine_start import make_engine
from b2batch.errors import ReplicaSuspect, StorageFull
from b2batch.models.loading import load_model
from b2batch.outputs.footer import read_footer
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import open_store
from b2batch.preflight import prepare_job
from b2batch.rows import Caution, CondemnedRow, PieceBegun
from b2batch.spec import ModelSpec, parse_spec
from b2batch.worker import Worker
from b2batch.worker_args import WorkerArgs

REVIEWS = [
    "房间很干净，服务也好，下次还会来。",
    "太差了，电池用了两天就坏，客服也不理人。",
    "书的内容很实用，推荐。",
    "酒店又旧又吵，再也不住了。",
]
TEMPLATE = "请判断下面这条评论的情感倾向,只回答“正面”或“负面”。\n{{ text }}"


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    return load_model(ModelSpec(model="baichuan2-tiny"))


def make_spec(tmp_path, rows, **sections):
    tmp_path.mkdir(exist_ok=True)
    source = tmp_path / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    source.write_text("\n".join(lines), encoding="utf-8")
    document = {
        "model": {"model": "baichuan2-tiny"},
        "input": {"path": str(source), "rows_per_unit": 3},
        "prompt": {"template": TEMPLATE},
        "sampling": {"max_tokens": 8},
        "output": {"path": str(tmp_path / "out")},
    }
    for name, keys in sections.items():
        document[name] = document.get(name, {}) | keys
    return parse_spec(document)


def work(spec, loaded):
    """Everything a replica does for a whole job; the output's rows by row id, and the worker."""
    job = prepare_job(spec)
    store = open_store(spec.output.path, job.record.run_id)
    directory = RunDirectory.open(store, job.record, job.plan.to_bytes())
    with directory.take_epoch():
        args = WorkerArgs(spec, job.plan.files, job.plan.schema, store.uri, job.record.run_id, 1, {})
        worker = Worker(args, loaded, make_engine(spec, loaded))
        reports = []
        units = list(job.plan.units)
        while units or not worker.idle:
            while units and worker.wants_unit:
                worker.add_unit(units.pop(0), attempt=1)
            reports += worker.step()
    assert [report.error for report in reports if report.error] == []
    rows = {row["row_id"]: row for row in pq.read_table(spec.output.path).to_pylist()}
    return rows, reports, worker


def test_reviews_come_back_labelled_in_one_part_a_unit(tmp_path, loaded):
    spec = make_spec(tmp_path, [{"text": text, "no": i} for i, text in enumerate(REVIEWS)])
    rows, reports, worker = work(spec, loaded)
    assert [row["no"] for row in rows.values()] == [0, 1, 2, 3]
    assert [row["generated_text"] for row in rows.values()] == ["正面", "负面", "正面", "负面"]
    assert {row["finish_reason"] for row in rows.values()} == {"stop"}
    assert [report.counts.num_ok for report in sorted(reports, key=lambda r: r.unit_index)] == [3, 1]
    assert worker.progress().num_rows == 4


def test_a_part_tells_the_size_of_the_steps_that_made_it(tmp_path, loaded):
    spec = make_spec(tmp_path, [{"text": text} for text in REVIEWS], engine={"max_num_seqs": 3})
    work(spec, loaded)
    footers = [read_footer(part.read_bytes()) for part in (tmp_path / "out").glob("part-*.parquet")]
    assert [footer.provenance for footer in footers] == [
        {"step": {"max_num_seqs": 3, "max_num_batched_tokens": 1024}}
    ] * 2


def test_a_bad_row_costs_only_itself(tmp_path, loaded):
    bad = ['{"text": ', {"text": None}, {"text": "   "}, {"text": "很好" * 2000}]
    rows, _, _ = work(make_spec(tmp_path, [{"text": REVIEWS[0]}, *bad, {"text": REVIEWS[1]}]), loaded)
    errors = {row_id: row["error"] for row_id, row in rows.items() if row["status"] == "error"}
    assert [error["type"] for error in errors.values()] == [
        "INPUT_JSON",
        "PROMPT_MISSING",
        "PROMPT_TOO_LONG",
    ]
    assert "line 2" in errors["0:1"]["message"]
    assert "4" in errors["0:4"]["message"], "says how many tokens there are"
    assert (rows["0:0"]["generated_text"], rows["0:5"]["generated_text"]) == ("正面", "负面")


def test_a_flood_of_bad_rows_is_counted_and_not_logged(tmp_path, loaded, caplog):
    spec = make_spec(tmp_path, ["{"] * 500)
    with caplog.at_level("WARNING", logger="b2batch.worker"):
        rows, _, worker = work(spec, loaded)
    told = [record.getMessage() for record in caplog.records if record.name == "b2batch.worker"]
    assert len(rows) == worker.progress().num_error_rows == 500
    assert sum("INPUT_JSON" in line for line in told) == 20
    assert "rows.jsonl, line 1:" in told[0]
    assert told[20:] == ["further failed rows are counted, not logged"]


@pytest.mark.parametrize(
    "limits", [{"max_num_seqs": 1}, {"max_num_batched_tokens": 64}, {"kv_cache_tokens": 1100}]
)
def test_answers_do_not_depend_on_the_batch(tmp_path, loaded, limits):
    rows = [{"text": text} for text in REVIEWS * 3]
    sampling = {"max_tokens": 12, "temperature": 4.0, "seed": 7, "n": 2, "ignore_eos": True}
    calm, _, _ = work(make_spec(tmp_path / "a", rows, sampling=sampling), loaded)
    other, _, _ = work(make_spec(tmp_path / "b", rows, sampling=sampling, engine=limits), loaded)
    assert [row["samples"] for row in calm.values()] == [row["samples"] for row in other.values()]
    texts = [sample["text"] for row in calm.values() for sample in row["samples"]]
    assert len(set(texts)) > len(texts) // 2, "they are drawn apart"


def test_a_cut_answer_and_a_cut_prompt_are_told(tmp_path, loaded):
    spec = make_spec(
        tmp_path,
        [{"text": "很好" * 2000}, {"text": REVIEWS[0]}],
        sampling={"max_tokens": 1},
        prompt={"on_too_long": "truncate_left"},
    )
    rows, reports, _ = work(spec, loaded)
    assert [row["finish_reason"] for row in rows.values()] == ["length", "length"]
    assert [row["prompt_truncated"] for row in rows.values()] == [True, False]
    assert rows["0:0"]["num_input_tokens"] == 1023
    assert reports[0].counts.num_length == 2


def test_a_row_may_bring_its_own_sampling(tmp_path, loaded):
    rows = [
        {"text": REVIEWS[0], "how": {"max_tokens": 1}},
        {"text": REVIEWS[0], "how": {"max_new_tokens": 3, "ignore_eos": True}},
        {"text": REVIEWS[0], "how": {"temperature": -1}},
        {"text": REVIEWS[0], "how": None},
        {"text": REVIEWS[0], "how": {"temperature": 1e-40}},
        {"text": REVIEWS[0], "how": {"stop_token_ids": [10**6]}},
    ]
    found, _, _ = work(make_spec(tmp_path, rows, input={"sampling_column": "how"}), loaded)
    assert [row["num_generated_tokens"] for row in found.values()] == [1, 3, None, 2, 2, None]
    assert found["0:2"]["error"]["type"] == "SAMPLING"
    assert "temperature" in found["0:2"]["error"]["message"]
    assert found["0:5"]["error"]["type"] == "SAMPLING"
    assert "1000000" in found["0:5"]["error"]["message"]


def open_worker(spec, loaded, engine=None):
    """A worker for the job, and the job's units."""
    job = prepare_job(spec)
    store = open_store(spec.output.path, job.record.run_id)
    RunDirectory.open(store, job.record, job.plan.to_bytes())
    args = WorkerArgs(spec, job.plan.files, job.plan.schema, store.uri, job.record.run_id, 1, {})
    return Worker(args, loaded, engine or make_engine(spec, loaded)), list(job.plan.units)


def test_a_batch_without_finite_logits_is_the_replicas_fault_once_and_then_the_rows(tmp_path):
    broken = load_model(ModelSpec(model="baichuan2-tiny"))
    spec = make_spec(tmp_path, [{"text": text} for text in REVIEWS])
    engine = make_engine(spec, broken)
    broken.model.model.norm.weight.data.fill_(float("nan"))
    worker, units = open_worker(spec, broken, engine)
    worker.add_unit(units[0], attempt=1)
    with pytest.raises(ReplicaSuspect, match="3 rows"):
        drain(worker)
    worker, units = open_worker(spec, broken, engine)
    worker.add_unit(units[0], attempt=2, trusts_nan=True)
    assert drain(worker)[0].counts.num_error == 3
    errors = [row["error"] for row in pq.read_table(spec.output.path).to_pylist()]
    assert {(error["type"], error["stage"]) for error in errors} == {("NAN", "generate")}


def test_under_caution_pieces_run_one_by_one_and_condemned_rows_do_not(tmp_path, loaded):
    spec = make_spec(tmp_path, [{"text": text} for text in REVIEWS[:3]])
    worker, units = open_worker(spec, loaded)
    caution = Caution((CondemnedRow(1, 2, "signal 11"),), ((2,), (0,)))
    worker.add_unit(units[0], attempt=5, caution=caution)
    assert worker.next_piece == PieceBegun(0, 5, 0)
    worker.begin_piece()
    assert worker.next_piece is None
    while worker.next_piece is None:
        assert worker.step() == []
    assert worker.next_piece == PieceBegun(0, 5, 1)
    worker.begin_piece()
    [report] = drain(worker)
    assert (report.attempt, report.counts.num_ok, report.counts.num_error) == (5, 2, 1)
    rows = pq.read_table(spec.output.path).to_pylist()
    assert [row["generated_text"] for row in rows] == ["正面", None, "正面"]
    assert (rows[1]["error"]["type"], rows[1]["error"]["stage"]) == ("WORKER_CRASH", "crash")
    assert "signal 11" in rows[1]["error"]["message"]


def test_a_dropped_unit_leaves_nothing_behind(tmp_path, loaded):
    spec = make_spec(tmp_path, [{"text": text} for text in REVIEWS])
    calm, _, _ = work(make_spec(tmp_path / "calm", [{"text": text} for text in REVIEWS]), loaded)
    worker, units = open_worker(spec, loaded)
    for unit in units:
        worker.add_unit(unit, attempt=1)
    worker.step()
    worker.drop_unit(0)
    worker.drop_unit(0)
    assert [report.unit_index for report in drain(worker)] == [1]
    worker.add_unit(units[0], attempt=2)
    drain(worker)
    rows = {row["row_id"]: row for row in pq.read_table(spec.output.path).to_pylist()}
    assert [row["generated_text"] for row in rows.values()] == [
        row["generated_text"] for row in calm.values()
    ]


class Short:
    """A model's runner with memory for steps of at most ``num_tokens``, or for none with a long prompt."""

    def __init__(self, runner, num_tokens, longest=10**9):
        self._runner, self._num_tokens, self._longest = runner, num_tokens, longest

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def run(self, step, unread=None):
        if sum(chunk.num_tokens for chunk in step.chunks) > self._num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if any(len(chunk.owner.tokens) > self._longest for chunk in step.chunks):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return self._runner.run(step, unread)


def test_out_of_memory_goes_on_with_less_at_once_and_loses_no_row(tmp_path, loaded):
    rows = [{"text": text} for text in REVIEWS * 3]
    calm, _, _ = work(make_spec(tmp_path / "calm", rows), loaded)
    spec = make_spec(tmp_path, rows)
    engine = make_engine(spec, loaded)
    engine.runner = Short(engine.runner, num_tokens=40)
    worker, units = open_worker(spec, loaded, engine)
    for unit in units:
        worker.add_unit(unit, attempt=1)
    assert sum(report.counts.num_ok for report in drain(worker)) == 12
    assert worker.progress().num_out_of_memory > 1
    found = {row["row_id"]: row for row in pq.read_table(spec.output.path).to_pylist()}
    assert [row["generated_text"] for row in found.values()] == [
        row["generated_text"] for row in calm.values()
    ]


def test_a_row_that_alone_needs_too_much_memory_is_a_row_error(tmp_path, loaded):
    spec = make_spec(tmp_path, [{"text": text} for text in [REVIEWS[0], REVIEWS[0] * 20, REVIEWS[1]]])
    engine = make_engine(spec, loaded)
    engine.runner = Short(engine.runner, num_tokens=10**9, longest=150)
    worker, units = open_worker(spec, loaded, engine)
    worker.add_unit(units[0], attempt=1)
    drain(worker)
    rows = pq.read_table(spec.output.path).to_pylist()
    assert [row["generated_text"] for row in rows] == ["正面", None, "负面"]
    assert (rows[1]["error"]["type"], rows[1]["error"]["stage"]) == ("OOM", "generate")
    assert "DefaultCPUAllocator" in rows[1]["error"]["message"]
    assert engine.max_num_seqs == 64, "the others have the whole batch again"


def test_a_part_that_could_not_be_saved_is_not_computed_again(tmp_path, loaded):
    spec = make_spec(tmp_path, [{"text": text} for text in REVIEWS[:3]])
    worker, units = open_worker(spec, loaded)
    good, worker._store = worker._store, FullStore()
    worker.add_unit(units[0], attempt=1)
    [failed] = drain(worker)
    assert failed.error[0] == "StorageFull"
    num_rows, worker._store = worker.progress().num_rows, good
    worker.add_unit(units[0], attempt=2)
    [saved] = drain(worker)
    assert (saved.attempt, saved.error, saved.counts.num_ok) == (2, None, 3)
    assert worker.progress().num_rows == num_rows == 3


def test_a_store_that_fails_costs_the_attempt_and_not_the_worker(tmp_path, loaded, monkeypatch):
    spec = make_spec(tmp_path, [{"text": text} for text in REVIEWS])
    job = prepare_job(spec)
    store = open_store(spec.output.path, job.record.run_id)
    RunDirectory.open(store, job.record, job.plan.to_bytes())
    args = WorkerArgs(spec, job.plan.files, job.plan.schema, store.uri, job.record.run_id, 1, {})
    worker = Worker(args, loaded, make_engine(spec, loaded))
    good = worker._store
    worker._store = FullStore()
    worker.add_unit(job.plan.units[0], attempt=1)
    first = drain(worker)
    worker._store = good
    worker.add_unit(job.plan.units[0], attempt=2)
    second = drain(worker)
    assert first[0].error is not None
    assert "No space left" in first[0].error[1]
    assert second[0].error is None
    assert replace(second[0], attempt=1).counts.num_ok == 3


class FullStore:
    def put_if_absent(self, key, data):
        raise StorageFull("No space left on device")


def drain(worker):
    reports = []
    while not worker.idle:
        reports += worker.step()
    return reports
