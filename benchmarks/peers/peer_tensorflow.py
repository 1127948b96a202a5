"""TensorFlow: ParameterServerStrategy with a coordinator, one worker and one parameter server, each a process.

The worker's gradient lies in its own memory; a scheduled function sends it to the server, applies TensorFlow's own
fused update there (ResourceApplyGradientDescent, ResourceApplyAdam), and reads the variable back to the worker.
TensorFlow has no fused AdamW, so Adam stands in for it: less work, which is in TensorFlow's favour.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["GRPC_VERBOSITY"] = "NONE"

import tensorflow as tf
import work

WORKER = "/job:worker/replica:0/task:0/device:CPU:0"


def main() -> None:
    if "PEER_JOB" in os.environ:
        serve(os.environ["PEER_JOB"], os.environ["PEER_CLUSTER"].split(","))
        return
    options = work.options()
    ports = free_ports(3)
    common = os.environ | {"PEER_CLUSTER": ",".join(ports)}
    tasks = [subprocess.Popen([sys.executable, *sys.argv], env=common | {"PEER_JOB": job}) for job in ("worker", "ps")]
    try:
        rows = {"TensorFlow ParameterServerStrategy": measure(ports, options.rounds, options.small_rounds)}
        work.answer("TensorFlow", f"tensorflow {tf.__version__}", rows)
    finally:
        for task in tasks:
            task.kill()
            task.wait()


def free_ports(count: int) -> list[str]:
    """Loopback ports that were free a moment ago; TensorFlow wants to be told them."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(found.getsockname()[1]) for found in sockets]
    for found in sockets:
        found.close()
    return ports


def cluster(ports: list[str]) -> tf.train.ClusterSpec:
    worker, ps, chief = (f"127.0.0.1:{port}" for port in ports)
    return tf.train.ClusterSpec({"worker": [worker], "ps": [ps], "chief": [chief]})


def serve(job: str, ports: list[str]) -> None:
    server = tf.distribute.Server(cluster(ports), job_name=job, task_index=0, protocol="grpc")
    server.join()


def measure(ports: list[str], rounds: int, small_rounds: int) -> dict[str, list[float]]:
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        cluster(ports), task_type="chief", task_id=0, rpc_layer="grpc"
    )
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    return {
        "SGD": dense(strategy, coordinator, "SGD", work.DENSE_BYTES, rounds),
        "AdamW": dense(strategy, coordinator, "Adam", work.DENSE_BYTES, rounds),
        "small": dense(strategy, coordinator, "SGD", work.SMALL_BYTES, small_rounds),
    }


def dense(strategy, coordinator, kind: str, size: int, rounds: int) -> list[float]:
    count = size // work.ITEM_BYTES
    with strategy.scope():
        weights, *slots = (tf.Variable(tf.zeros(count)) for _ in range(3 if kind == "Adam" else 1))
    with tf.device(WORKER):
        gradient = tf.Variable(tf.fill([count], work.GRADIENT))

    @tf.function
    def push_pull() -> tf.Tensor:
        with tf.device(WORKER):
            pushed = gradient.read_value()
        with tf.device(weights.device):
            applied = apply(kind, weights, slots, pushed)
        with tf.control_dependencies([applied]), tf.device(weights.device):
            fresh = weights.read_value()
        with tf.device(WORKER):
            return fresh[0]  # the slice is taken on the worker: all of it has travelled

    def once() -> None:
        coordinator.schedule(push_pull)
        coordinator.join()

    found = work.timed(once, rounds)
    if kind == "SGD":
        work.check(weights[-1].numpy(), rounds + work.WARM_UP)
    return found


def apply(kind: str, weights, slots, gradient: tf.Tensor) -> tf.Operation:
    if kind == "SGD":
        return tf.raw_ops.ResourceApplyGradientDescent(var=weights.handle, alpha=work.SGD["lr"], delta=gradient)
    return tf.raw_ops.ResourceApplyAdam(
        var=weights.handle,
        m=slots[0].handle,
        v=slots[1].handle,
        beta1_power=0.9,
        beta2_power=0.999,
        lr=work.ADAMW["lr"],
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        grad=gradient,
    )


if __name__ == "__main__":
    main()
