"""`forwardpass trace`: a network's layers in execution order, with shapes, costs, fusion and measured times.

Given input rows, also the intermediate tensors, with each z and a compared with the equations in NumPy float64.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forwardpass.console import connection_options
from forwardpass.console.tables import count, shape, table
from forwardpass.errors import InsightError
from forwardpass.insight import cost, equation_check, graph_svg, model_argument, ort_profile
from forwardpass.insight.model_argument import Source
from forwardpass.model.onnx_graph import Graph, build, read

_HEADERS = (
    *("layer", "node", "operator", "gives", "shape", "stored", "FLOPs/row", "FLOPs/batch", "bytes/row", "bytes/batch"),
    *("runs as", "µs", "share"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_argument.add_arguments(parser)
    parser.add_argument("--batch", type=int, metavar="B", help="rows in the batch [1, or as many as --input has]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the graph from left to right")
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help="rows to run (.npy, .npz, .csv, .json): hold z and a against float64"
    )
    parser.add_argument("--activations", type=Path, metavar="FILE", help="with --input: save every z and a as .npz")
    parser.add_argument(
        "--server", metavar="HOST:PORT", help="with --input: hold the answer of a running server against float64 too"
    )
    connection_options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Trace, print, save. Returns 1 if a tensor is outside the tolerance. Raises InsightError, ContractError."""
    for option in ("activations", "server"):
        if args.input is None and getattr(args, option) is not None:
            raise InsightError(f"--{option} needs --input: the rows to run")
    found = model_argument.find(args.model, args.repository)
    model = read(found.path)
    feeds = equation_check.load_rows(args.input, build(model, 1)) if args.input is not None else None
    rows = _batch(args.batch, feeds)
    graph = build(model, rows)
    if feeds is None:
        feeds = ort_profile.example_rows(graph, found.contract)
        checks: list[equation_check.Check] = []
    else:
        how = connection_options.options_of(args)
        checks = equation_check.against_equations(graph, found, feeds, args.activations, args.server, how)
    executed = ort_profile.execute(graph, found.path, feeds)
    report = _report(graph, found, executed, checks)
    if args.svg is not None:
        args.svg.write_text(_drawn(graph, found, executed), "utf-8")
    print(json.dumps(report, indent=1, ensure_ascii=False) if args.json else _text(graph, report))
    failed = [one for one in checks if one.failure is not None]
    for one in failed:
        print(f"forwardpass trace: {one.tensor} ({one.equation}): {one.failure}", file=sys.stderr)
    return 1 if failed else 0


def _batch(wanted: int | None, feeds: equation_check.Arrays | None) -> int:
    given = len(next(iter(feeds.values()))) if feeds is not None else None
    if wanted is not None and given is not None and wanted != given:
        raise InsightError(f"--batch {wanted}: --input has {given} rows; leave out one of them")
    return given or (1 if wanted is None else wanted)


def _report(
    graph: Graph, found: Source, executed: ort_profile.Execution, checks: list[equation_check.Check]
) -> dict[str, Any]:
    """The whole trace, ready for JSON."""
    steps = {name: step for step in executed.steps for name in step.covers}
    nodes_time = executed.node_microseconds or 1.0
    nodes = []
    costs = []
    for node in graph.nodes:
        spent = cost.of_node(graph, node)
        costs.append(spent)
        step = steps.get(node.name)
        first = step is not None and step.covers[0] == node.name
        nodes.append(
            {
                "layer": node.layer,
                "node": node.name,
                "operator": node.op,
                "tensor": node.outputs[0],
                "label": graph.labels.get(node.outputs[0], ""),
                "shape": graph.shapes.get(node.outputs[0]),
                **_costs(spent, graph.rows),
                "runs_as": step.op if step is not None else "constant",
                "fused": step is not None and len(step.covers) > 1,
                # A fused node's time is listed with the first of the nodes that it covers.
                "microseconds": step.microseconds if step is not None and first else None,
                "share": step.microseconds / nodes_time if step is not None and first else None,
            }
        )
    return {
        "model": found.title,
        "runtime": f"ONNX Runtime {ort_profile.VERSION}, {ort_profile.PROVIDER}, 1 thread",
        "batch": graph.rows,
        "shapes": [{"tensor": _named(graph, name), "shape": graph.shapes.get(name)} for name in graph.spine],
        "nodes": nodes,
        "total": _costs(cost.total(costs), graph.rows),
        "run_microseconds": executed.run_microseconds,
        "node_microseconds": executed.node_microseconds,
        "profiled_runs": executed.runs,
        "checks": [
            {"tensor": c.tensor, "equation": c.equation, "largest_difference": c.largest, "holds": c.failure is None}
            for c in checks
        ],
        "tolerance": {"rtol": found.tolerance.rtol, "atol": found.tolerance.atol},
    }


def _costs(spent: cost.Cost, rows: int) -> dict[str, int | float | None]:
    return {
        "parameters": spent.parameters,
        "weight_bytes": spent.weight_bytes,
        "flops_row": None if spent.flops is None else spent.flops / rows,
        "flops_batch": spent.flops,
        "bytes_row": None if spent.activation_bytes is None else spent.activation_bytes / rows,
        "bytes_batch": spent.batch_bytes,
    }


def _named(graph: Graph, tensor: str) -> str:
    return tensor if tensor in graph.inputs else graph.labels[tensor]


def _text(graph: Graph, report: Mapping[str, Any]) -> str:
    rows = [
        [str(n["layer"]), n["node"], n["operator"], n["label"], *_cells(n, shape(n["shape"])), *_ran(n)]
        for n in report["nodes"]
    ]
    nodes_time = f"{report['node_microseconds']:.2f}"
    rows.append(["", "all", "", "", *_cells(report["total"], ""), "", nodes_time, "100%"])
    lines = [
        f"{report['model']}, a batch of {report['batch']} on {report['runtime']}",
        "",
        " -> ".join(shape(step["shape"]) for step in report["shapes"]),
        f"({', '.join(step['tensor'] for step in report['shapes'])})",
        "",
        table(_HEADERS, rows, left=(1, 2, 3, 4, 10)),
        "",
        *_fusions(report),
        f"a run takes {report['run_microseconds']:.3g} µs (median, without the profiler), "
        f"{report['run_microseconds'] / graph.rows:.3g} µs a row; µs by node are means of "
        f"{report['profiled_runs']} runs with the profiler, which itself takes up to 2 µs a node",
    ]
    if report["checks"]:
        allowed = report["tolerance"]
        checks = [
            [c["tensor"], c["equation"], f"{c['largest_difference']:.2e}", "holds" if c["holds"] else "DIFFERS"]
            for c in report["checks"]
        ]
        largest = max(c["largest_difference"] for c in report["checks"])
        lines += [
            "",
            f"against the equations in float64, allowed {allowed['atol']:g} + {allowed['rtol']:g}·|expected|:",
            table(["tensor", "is", "largest difference", ""], checks, left=(0, 1, 3)),
            f"largest difference {largest:.2e}",
        ]
    return "\n".join(lines)


def _cells(costs: Mapping[str, Any], sizes: str) -> list[str]:
    keys = ("parameters", "flops_row", "flops_batch", "bytes_row", "bytes_batch")
    return [sizes, *(count(costs[key]) for key in keys)]


def _ran(node: Mapping[str, Any]) -> list[str]:
    if node["microseconds"] is None:
        return [node["runs_as"], '"' if node["fused"] else "", ""]
    return [node["runs_as"], f"{node['microseconds']:.2f}", f"{node['share']:.0%}"]


def _fusions(report: Mapping[str, Any]) -> list[str]:
    lines = []
    together: list[str] = []
    for node in [*report["nodes"], {"fused": False, "microseconds": 0.0, "operator": ""}]:
        if together and (not node["fused"] or node["microseconds"] is not None):
            lines.append(f"fused: {' + '.join(together[1:])} run as one {together[0]}")
            together = []
        if node["fused"]:
            together = [*(together or [node["runs_as"]]), f"{node['operator']} ({node['node']})"]
    return lines


def _drawn(graph: Graph, found: Source, executed: ort_profile.Execution) -> str:
    nodes_time = executed.node_microseconds or 1.0
    ran = [
        graph_svg.ExecutedStep(
            step.op, step.covers, f"{step.microseconds:.1f} µs, {step.microseconds / nodes_time:.0%}"
        )
        for step in executed.steps
    ]
    stored = {node.name: cost.of_node(graph, node).parameters for node in graph.nodes}
    return graph_svg.svg(graph, f"{found.title}: the forward pass of a batch of {graph.rows}", ran, stored)
