"""Other runtimes with the same weights, for inference: ONNX Runtime, OpenVINO, TensorRT.

Their builders take a model in evaluation mode.
"""

import copy
import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.rivals.cuda_graphs import needs_gpu
from jasper_fast.bench.rivals.eager_layouts import Model
from jasper_fast.inference import export
from jasper_fast.nn.architecture import out_lengths as frames_out


def onnx_runtime(model: nn.Module) -> Model:
    """Returns the model in ONNX Runtime, with inputs and outputs on the model's device."""
    weight = next(model.parameters())
    if weight.device.type == "cpu" and weight.dtype is torch.bfloat16:
        raise Absent("ONNX Runtime has no bf16 convolutions on a CPU")
    for module in ("onnxruntime", "onnx", "onnxscript"):
        _need(module, "pip install onnxruntime onnx onnxscript")
    import onnxruntime

    device = weight.device
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that keep spinning after a call would take the cores from the next contender.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise Absent(f"onnxruntime has no {provider}: pip install onnxruntime-gpu")
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    settings = {"device_id": str(stream.device.index), "user_compute_stream": str(stream.cuda_stream)} if stream else {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "jasper.onnx"
        export.write_onnx(model, path, ("features", "lengths"), ("log_probs", "out_lengths"))
        session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, settings)])
    if provider not in session.get_providers():  # ONNX Runtime falls back to the CPU with only a warning
        raise Absent(f"onnxruntime cannot load its {provider}: install the CUDA and cuDNN for which it was built")
    return bound(session, model, stream)


def bound(session, model: nn.Module, stream: "torch.cuda.Stream | None" = None) -> Model:
    """Returns a function that runs an ONNX Runtime session on tensors without copying them from their device.

    The session runs on `stream`. That stream and the caller's stream wait for each other, so that no data is read
    before it is written.
    """
    numbers = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}

    def place(name: str, t: Tensor) -> dict:
        if t.dtype not in numbers:
            raise ValueError(f"the ONNX Runtime rival does not support {t.dtype}; use --dtype fp32 or fp16")
        at = {"device_type": t.device.type, "device_id": t.device.index or 0, "buffer_ptr": t.data_ptr()}
        return {"name": name, "element_type": numbers[t.dtype], "shape": tuple(t.shape), **at}

    def call(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        features, lengths = features.contiguous(), lengths.contiguous()
        N, T, V = features.shape[0], frames_out(model.config, features.shape[2]), model.decoder.layers[0].out_channels
        log_probs, out_lengths = features.new_empty((N, T, V), dtype=torch.float32), torch.empty_like(lengths)
        binding = session.io_binding()
        binding.bind_input(**place("features", features))
        binding.bind_input(**place("lengths", lengths))
        binding.bind_output(**place("log_probs", log_probs))
        binding.bind_output(**place("out_lengths", out_lengths))
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        session.run_with_iobinding(binding)
        if stream is not None:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        return log_probs, out_lengths

    return call


def openvino(model: nn.Module) -> Model:
    """Returns the model in OpenVINO on the CPU, with fp32 weights and, for a bf16 model, arithmetic in bf16."""
    half = next(model.parameters()).dtype is torch.bfloat16
    return _compiled(_converted(model), "bf16" if half else "f32")


def openvino_int8(model: nn.Module) -> Model:
    """Returns the model in OpenVINO in int8. NNCF quantises it with the first inputs of each shape."""
    _need("nncf", "pip install openvino nncf")
    converted, ready = _converted(model), {}

    def call(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if features.shape not in ready:
            import nncf

            sample = nncf.Dataset([(features.float().numpy(), lengths.numpy())])
            ready[features.shape] = _compiled(nncf.quantize(converted, sample, subset_size=1), "f32")
        return ready[features.shape](features, lengths)

    return call


def _converted(model: nn.Module) -> object:
    """Returns the model as an OpenVINO network in fp32."""
    _need("openvino", "pip install openvino")
    if next(model.parameters()).device.type != "cpu":
        raise Absent("OpenVINO is timed on the CPU only")
    import openvino as ov

    features = torch.zeros(2, model.config.encoder.in_feats, 64)
    with torch.no_grad():
        return ov.convert_model(copy.deepcopy(model).float(), example_input=(features, torch.full((2,), 64)))


def _compiled(network: object, precision: str) -> Model:
    import openvino as ov

    hints = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # pinned threads would disturb the contenders that run in between
        "INFERENCE_PRECISION_HINT": precision,
    }
    ready = ov.compile_model(network, "CPU", hints)

    def call(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        found = ready((features.float().numpy(), lengths.numpy()))
        return torch.from_numpy(found[0].copy()), torch.from_numpy(found[1].copy())

    return call


def tensorrt(model: nn.Module) -> Model:
    """Returns the model in TensorRT, by torch_tensorrt's backend for torch.compile."""
    needs_gpu(model, "TensorRT")
    _need("torch_tensorrt", "pip install torch-tensorrt")
    import torch_tensorrt  # noqa: F401  the import registers the backend

    return torch.compile(model, backend="tensorrt", dynamic=False)


def _need(module: str, get: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Absent(f"{module} is not installed: {get}")
