"""The run-time compiler: cubins of the device headers, its cache on disk and, on a GPU, launches."""

import multiprocessing
import pathlib
import pickle
import struct
import warnings

import pytest
import torch

try:
    from sbkernels.backends import nvrtc
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

CSRC = pathlib.Path(__file__).parent.parent / "csrc"
SMALL = '#include "scale.cuh"\ntemplate <int N> __global__ void kernel(float* x) { x[threadIdx.x] *= SCALE * N; }\n'

# Something of everything the headers have, whether or not it makes sense.
HEADERS = """
#include "math.cuh"
#include "params.h"
static_assert(sizeof(sbk::Tensor) == 32);
template <typename Run, bool SIMPLE> SBK_FN float walk(Run& run) {
  using Path = typename Run::template Path<SIMPLE>;
  typename Path::Total total = Path::total(run);
  const auto row = Path::combine(total, Path::combine(Path::identity(), Path::from_lane(total, 1)));
  Path::settle(total, row);
  const float carry = Path::advance(Run::WHOLE, total);
  float A[16], sum = Run::stick(Path::undo(carry, total));
  Path::weights(run, Path::enter(carry, total), row, A);
  for (int t = 0; t < 16; t++) sum += A[t];
  return sum;
}
template <typename T, typename Run> __global__ void kernel(sbk::ForwardParams p) {
  extern __shared__ __align__(16) char tile[];
  __shared__ float scratch[64];
  const unsigned row = sbk::shared_address(tile) + threadIdx.x * 16;
  sbk::copy_async_16(row, (const T*)p.q.data + threadIdx.x * 8, 16);
  sbk::copy_async_4(row, (const T*)p.k.data + threadIdx.x * 8, 4);
  sbk::copy_async_commit();
  sbk::copy_async_wait<0>();
  __syncthreads();
  unsigned a[4], b[4];
  sbk::load_matrices<true>(a, row);
  sbk::load_matrices<false>(b, row);
  float c[4] = {};
  sbk::multiply_add<T>(c, a, sbk::transpose_matrix(b[0]), sbk::pack<T>(1.f, 2.f));
  Run run;
  float s[16];
  for (int t = 0; t < 16; t++) s[t] = c[t % 4] * t;
  run.absorb(s);
  float sum = run.simple() ? walk<Run, true>(run) : walk<Run, false>(run), four[4] = {s[0], s[1], s[2], s[3]}, one[1] = {s[4]};
  sbk::RestReciprocal<4>::of(four, four);
  sbk::RestTanh::of(one, one);
  for (int t = 0; t < 16; t++) sum += run.gradient(t, s[t], sum) + four[t % 4] + one[0];
  scratch[threadIdx.x] = sum;
  __syncthreads();
  if (Run::alive(sum)) p.remainder[threadIdx.x] = scratch[63 - threadIdx.x];
}
"""
RUNS = ("LinearRun<16>", "LogRun<16>", "LogRun<16, sbk::SoftplusApproximate>", "LogRun<16, sbk::SoftplusLibrary>")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("SBKERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compile_small(cache, tmp_path):
    """compile_cubin of SMALL with a folder of one header; arguments by name replace its own."""
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / "scale.cuh").write_text("#define SCALE 2\n")
    defaults = {"source": SMALL, "name_expressions": ("kernel<3>",), "arch": "sm_80", "options": ()}
    return lambda **changed: nvrtc.compile_cubin(**(defaults | {"headers": tmp_path / "headers"} | changed))


@pytest.fixture
def compilations(monkeypatch):
    """The calls of NVRTC so far."""
    calls, original = [], nvrtc._compile
    monkeypatch.setattr(nvrtc, "_compile", lambda *arguments: calls.append(arguments) or original(*arguments))
    return calls


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_headers_compile(cache, arch):
    names = tuple(f"kernel<sbk::{dtype}, sbk::{run}>" for dtype in ("half", "bfloat") for run in RUNS)
    compiled = nvrtc.compile_cubin(HEADERS, names, arch, (), CSRC)
    assert compiled.cubin.startswith(b"\x7fELF") and tuple(compiled.names) == names
    assert all(lowered.encode() + b"\0" in compiled.cubin for lowered in compiled.names.values())
    assert "warning" not in compiled.log
    for name, resources in nvrtc.resource_usage(compiled).items():
        assert 16 <= resources.registers <= 128, f"{name}: {resources}"
        assert (resources.stack_bytes, resources.spill_bytes, resources.shared_bytes) == (0, 0, 256), f"{name}: {resources}"


def test_resource_usage_sees_spills(compile_small):
    source = """
    __global__ void kernel(float* x) {
      float y[100];
      #pragma unroll
      for (int i = 0; i < 100; i++) y[i] = x[i * 1024 + threadIdx.x];
      __syncthreads();
      #pragma unroll
      for (int i = 0; i < 100; i++) x[i * 1024 + threadIdx.x] = y[99 - i] * y[i];
    }"""
    compiled = compile_small(source=source, name_expressions=("kernel",), options=("--maxrregcount=32",))
    resources = nvrtc.resource_usage(compiled)["kernel"]
    assert resources.registers == 32 and resources.stack_bytes > 0 and resources.spill_bytes > 0


def test_second_call_does_not_compile(compile_small, compilations, cache):
    first = compile_small()
    assert compile_small() == first and len(compilations) == 1
    assert [path.name for path in cache.iterdir()] == [first.key]


def test_key_changes_with_every_input(compile_small, compilations, tmp_path, monkeypatch):
    keys = [compile_small().key]
    for changed in ({"arch": "sm_90"}, {"options": ("-DX",)}, {"name_expressions": ("kernel<4>",)}, {"source": SMALL + "//"}):
        keys.append(compile_small(**changed).key)
    (tmp_path / "headers" / "scale.cuh").write_text("#define SCALE 3\n")
    keys.append(compile_small().key)
    (tmp_path / "headers" / "unused.h").write_text("")
    keys.append(compile_small().key)
    monkeypatch.setattr(nvrtc, "VERSION", (99, 0))
    keys.append(compile_small().key)
    assert len(set(keys)) == len(keys) == len(compilations)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: b"",
        lambda entry: entry[:20],
        lambda entry: entry[:-1],
        lambda entry: entry + b"\0",
        lambda entry: b"?" + entry[1:],
        lambda entry: entry[:100] + bytes([entry[100] ^ 1]) + entry[101:],
    ],
    ids=["empty", "no header", "truncated", "longer", "magic", "flipped bit"],
)
def test_damaged_entry_is_replaced(compile_small, compilations, cache, damage):
    first = compile_small()
    path = cache / first.key
    path.write_bytes(damage(path.read_bytes()))
    again = compile_small()
    assert again.names == first.names and len(compilations) == 2
    assert compile_small() == again and len(compilations) == 2


def test_entry_of_another_key_is_not_served(compile_small, compilations, cache):
    first, second = compile_small(), compile_small(arch="sm_90")
    (cache / second.key).rename(cache / first.key)
    assert compile_small().names == first.names and len(compilations) == 3


def compile_together(barrier, headers):
    barrier.wait()
    nvrtc.compile_cubin(SMALL, ("kernel<3>",), "sm_80", (), headers)


def test_many_processes_at_once(compile_small, compilations, cache, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sbkernels.backends.nvrtc"])
    barrier = context.Barrier(8)
    processes = [context.Process(target=compile_together, args=(barrier, tmp_path / "headers")) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert [path.name for path in cache.iterdir()] == [compile_small().key] and not compilations


def test_unwritable_cache(compile_small, compilations, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SBKERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"kernels are not kept: .*/file/cache: Not a directory; SBKERNELS_CACHE names another"):
        compile_small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_small()
    assert len(compilations) == 2


def test_compile_error(compile_small, cache):
    source = SMALL + "__device__ int unused() { int zero = 0; return 1; }\n__device__ float bad() { return nonsense; }\n"
    with pytest.raises(nvrtc.CompileError, match=r"^cannot compile kernel<3> for sm_80:\nkernel.cu\(4\): error: ") as raised:
        compile_small(source=source)
    assert "return nonsense; }" in str(raised.value) and "zero" in raised.value.log
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arch": "sm_1"}, "for sm_1:\nnvrtc: error: invalid value for --gpu-architecture"),
        ({"options": ("--nonsense",)}, "error: unrecognized option --nonsense"),
        ({"name_expressions": ("nonsense<3>",)}, 'identifier "nonsense" is undefined'),
        ({"source": SMALL + '__global__ void other() { asm("nonsense;"); }'}, "known instruction: 'nonsense'"),
    ],
)
def test_other_compile_errors(compile_small, changed, message):
    with pytest.raises(nvrtc.CompileError, match=message):
        compile_small(**changed)


def test_headers_of_the_working_directory_are_not_taken(compile_small, tmp_path, monkeypatch):
    (tmp_path / "scale.cuh").write_text("#error not this one\n")
    monkeypatch.chdir(tmp_path)
    compile_small()


LAUNCHED = """
struct Params { const float* x; float* y; int shift; float factor; };
static_assert(sizeof(Params) == 24);
__global__ void shift_and_scale(Params p) {
  extern __shared__ float tile[];
  const int last = SHARED_BYTES / 4 - blockDim.x;  // the threads' values lie at the end
  tile[last + threadIdx.x] = p.x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  p.y[blockIdx.x * blockDim.x + threadIdx.x] = p.factor * tile[last + (threadIdx.x + p.shift) % blockDim.x];
}
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="launches need a CUDA device")
@pytest.mark.parametrize("shared_bytes", [4096, 96 * 1024])
def test_launch(compile_small, shared_bytes):
    """On a side stream of every device, then replayed as a CUDA graph."""
    grid, block, shift, factor = 7, 256, 3, 2.5
    for index in range(torch.cuda.device_count()):
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
        options = (f"-DSHARED_BYTES={shared_bytes}",)
        compiled = compile_small(source=LAUNCHED, name_expressions=("shift_and_scale",), arch=arch, options=options)
        functions = nvrtc.load(compiled, index)
        assert nvrtc.load(compiled, index) is functions
        x = torch.randn(grid, block, device=f"cuda:{index}")
        y = torch.zeros_like(x)
        params = struct.pack("=QQif", x.data_ptr(), y.data_ptr(), shift, factor)
        before = torch.cuda.current_device()

        def run(stream, function=functions["shift_and_scale"], params=params, index=index):
            nvrtc.launch(function, grid, block, shared_bytes, params, stream.cuda_stream, index)

        stream = torch.cuda.Stream(index)
        stream.wait_stream(torch.cuda.current_stream(index))
        run(stream)
        stream.synchronize()
        assert torch.cuda.current_device() == before
        assert torch.equal(y, factor * x.roll(-shift, 1))
        with torch.cuda.device(index):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run(stream)
            x.normal_()
            graph.replay()
            torch.cuda.synchronize()
        assert torch.equal(y, factor * x.roll(-shift, 1))
