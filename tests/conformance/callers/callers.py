"""Calls servers by turns (round_robin, no health checks, no retries) from many threads until standard input ends.

Then prints how many calls were answered and how many failed, by text, as JSON.
callers.py ADDRESS,ADDRESS... REQUEST_FILE CALLERS, where the file has the message of a ModelInfer. Any grpcio.
"""

import json
import sys
import threading
from collections import Counter
from pathlib import Path

import grpc

addresses, request, callers = sys.argv[1], Path(sys.argv[2]).read_bytes(), int(sys.argv[3])
# Without retries of the channel's own; those that the protocol has for calls that no server saw remain.
options = [("grpc.lb_policy_name", "round_robin"), ("grpc.enable_http_proxy", 0)]
ok = 0
failed: Counter[str] = Counter()
lock = threading.Lock()
over = threading.Event()


def call_on() -> None:
    global ok
    while not over.is_set():
        try:
            infer(request, wait_for_ready=False)
        except grpc.RpcError as error:
            with lock:
                failed[f"{error.code()}: {error.details()}"] += 1
        else:
            with lock:
                ok += 1


with grpc.insecure_channel(f"ipv4:{addresses}", options=options) as channel:
    infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    grpc.channel_ready_future(channel).result(30)
    threads = [threading.Thread(target=call_on) for _ in range(callers)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
print(json.dumps({"ok": ok, "failed": failed}))
