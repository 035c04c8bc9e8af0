"""Small mistakes in the CUDA sources of the conv and of NovoGrad. Each must make a test fail.

A mistake is (file, correct text, wrong text), by name.
"""

# ruff: noqa: E501 (one line per mistake)

WGMMA, MMA, PANELS, EPILOGUE = "conv1d_wgmma.cuh", "conv1d_mma.cuh", "conv1d.cuh", "conv1d_epilogue.cuh"
WGRAD, WGRAD90 = "conv1d_wgrad.cuh", "conv1d_wgrad90.cuh"
STEP = "novograd.cuh"

MUTANTS: dict[str, tuple[str, str, str]] = {
    # phases and arrival counts of mbarriers
    "producer waits for the wrong phase": (WGMMA, "mbarrier_wait(empty(), phase ^ 1)", "mbarrier_wait(empty(), phase)"),
    "consumer waits for the wrong phase": (WGMMA, "mbarrier_wait(full(), phase)", "mbarrier_wait(full(), phase ^ 1)"),
    "the phase never turns": (WGMMA, "slot = 0, phase ^= 1;", "slot = 0;"),
    "half of a step's bytes are expected": (WGMMA, "(ring.full(), kWeightBytes)", "(ring.full(), kWeightBytes / 2)"),
    "too few arrivals free weights": (WGMMA, "barriers + i * 16 + 8, kConsumers / 32);\n    for", "barriers + i * 16 + 8, 1);\n    for"),
    "too few arrivals fill a panel": (WGMMA, "barriers + i * 16, kPanelThreads)", "barriers + i * 16, 1)"),
    "too many arrivals fill a panel": (WGMMA, "barriers + i * 16, kPanelThreads)", "barriers + i * 16, 128)"),
    "mbarriers are not shown to the copies": (WGMMA, "    ptx::fence_mbarrier_init();\n", ""),
    # waits
    "weights are not waited for": (WGMMA, "    weights.wait_full();\n    const int shift", "    const int shift"),
    "the first panel is not waited for": (WGMMA, "  panels.wait_full();\n  ptx::wgmma_hold", "  ptx::wgmma_hold"),
    "the next panel is not waited for": (WGMMA, "if (i + 1 < tile.count) panels.wait_full();", ""),
    "products are not waited for": (WGMMA, "    ptx::wgmma_wait<1>();  // the step before has read its operands\n", ""),
    "weights are freed while they are read": (WGMMA, "ptx::mbarrier_arrive(used_weights);\n    if", "ptx::mbarrier_arrive(weights.empty());\n    if"),
    "the last weights are not freed": (WGMMA, "ptx::mbarrier_arrive(used_weights), ptx", "ptx"),
    "the last products are not waited for": (WGMMA, "  ptx::wgmma_wait<0>();\n", ""),
    "panels are full before they landed": (WGMMA, "      ptx::copy_wait<0>();\n    else", "      ;\n    else"),
    "of small panels too many are under way": (WGMMA, "copy_wait<kMaxPanels - 2>", "copy_wait<kMaxPanels - 1>"),
    "a producer overwrites": (WGMMA, "    copies.ring.wait_empty();\n", ""),
    # fences and groups
    "panels are not shown to wgmma": (WGMMA, "    ptx::fence_async_proxy();\n", ""),
    "no fence before products": (WGMMA, "    ptx::wgmma_fence();\n", ""),
    "products are not committed": (WGMMA, "    ptx::wgmma_commit();\n", ""),
    # descriptors
    "left operand: strides change places": (WGMMA, "* 16, kChunk * 16, 128)", "* 16, 128, kChunk * 16)"),
    "left operand, transposed: strides change places": (WGMMA, "w + k * 256, 128, kChunk * 16)", "w + k * 256, kChunk * 16, 128)"),
    "left operand: steps of 8": (WGMMA, "w + k * 2 * kChunk * 16", "w + k * kChunk * 16"),
    "left operand, transposed: steps of 8": (WGMMA, "w + k * 256, 128, kChunk", "w + k * 128, 128, kChunk"),
    "right operand: its rows are even": (WGMMA, "layout.rows * 16, layout.rows * 16, 128)", "layout.rows * 16, (layout.rows + 1) * 16, 128)"),
    "right operand: every other core matrix": (WGMMA, "layout.rows * 16, layout.rows * 16, 128)", "layout.rows * 16, layout.rows * 16, 256)"),
    "right operand: steps of 8": (WGMMA, "x + k * 2 * layout.rows * 16", "x + k * layout.rows * 16"),
    "both warpgroups take the same weights": (WGMMA, "kWeightBytes + half * (kImage * 2);", "kWeightBytes;"),
    "a tap is a row late": (WGMMA, "(a.stride == 1 ? shift : shift / 2)) * 16;", "(a.stride == 1 ? shift + 1 : shift / 2)) * 16;"),
    "both copies bring the first image": (WGMMA, "(a, tile, step, half),", "(a, tile, step, 0),"),
    "a consumer is not in the barrier": (WGMMA, "barrier_sync(1, kConsumers)", "barrier_sync(1, kConsumers - 32)"),
    # launches that overlap
    "the launch before is not waited for": (WGMMA, "    ptx::grid_dependency_wait();\n", ""),
    "lengths are read before the wait": (WGMMA, "guess(a, FRAMES, first, false)", "guess(a, FRAMES, first, true)"),
    "the tile is read before the wait": (WGMMA, "    ptx::grid_dependency_wait();\n    ptx::grid_launch_dependents();\n    if (!Tile(a, FRAMES, first).same_steps(guess)) wrong = early;\n", "    if (!Tile(a, FRAMES, first).same_steps(guess)) wrong = early;\n    ptx::grid_dependency_wait();\n    ptx::grid_launch_dependents();\n"),
    "the copying warps alone wait": (WGMMA, "    ptx::grid_dependency_wait();\n", "    if (warp < 4) ptx::grid_dependency_wait();\n"),
    "the launch after begins too soon": (WGMMA, "    ptx::grid_dependency_wait();\n    ptx::grid_launch_dependents();\n", "    ptx::grid_launch_dependents();\n    ptx::grid_dependency_wait();\n"),
    "weights of a wrong guess are multiplied": (WGMMA, "  for (int i = 0; i < wrong;", "  for (int i = wrong; i < wrong;"),
    "weights of a right guess are copied again": (WGMMA, "from = early - wrong;", "from = 0;"),
    "one early step is forgotten": (WGMMA, "weights, 0, early);", "weights, 0, early - 1);"),
    # mma.sync
    "mma: the launch before is not waited for": (MMA, "    ptx::grid_dependency_wait();\n", ""),
    "mma: lengths are read before the wait": (MMA, "  if constexpr (kChained<MODE, TRANSPOSED>) {\n    ptx::grid", "  const Tile before(a, BLOCK, static_cast<int>(blockIdx.x));\n  if constexpr (kChained<MODE, TRANSPOSED>) {\n    ptx::grid"),
    "one step too many under way": (MMA, "ptx::copy_wait<STAGES - 2>();", "ptx::copy_wait<STAGES - 1>();"),
    "a late panel is not waited for": (MMA, "odd_panel_group_) > i)", "odd_panel_group_) > i + 1)"),
    "warps run apart": (MMA, "      __syncthreads();\n      if constexpr (ASYNC) {\n        issue", "      if constexpr (ASYNC) {\n        issue"),
    "weights of the next step": (MMA, "weights_ + i % STAGES * kWeightBytes);\n      if", "weights_ + (i + 1) % STAGES * kWeightBytes);\n      if"),
    "a panel in use is overwritten": (MMA, "next_panel_ < current + a_.panels_kept", "next_panel_ <= current + a_.panels_kept"),
    "frames: halves change places": (MMA, "matrix % 2 * 8 + row + matrix / 2 * rows_", "matrix / 2 * 8 + row + matrix % 2 * rows_"),
    "frames: steps of 8": (MMA, "from + (k * 2 * rows_ + m * 16)", "from + (k * rows_ + m * 16)"),
    "weights: halves change places": (MMA, "(k * 2 + matrix % 2) * kChunk + (n + matrix / 2)", "(k * 2 + matrix / 2) * kChunk + (n + matrix % 2)"),
    "weights, transposed: halves change places": (MMA, "(n + matrix / 2) * kChunk + k * 16 + matrix % 2 * 8", "(n + matrix % 2) * kChunk + k * 16 + matrix / 2 * 8"),
    "a share is read before it is there": (MMA, "load_acquire(arrived) < a.splits", "load_acquire(arrived) < 1"),
    "the counter is not set back": (MMA, "== 2 * a.splits - 1", "== 2 * a.splits"),
    # tiles and panels
    "a row of the padding is read": (PANELS, "frame < limit && channel", "frame <= limit && channel"),
    "the first row is not read": (PANELS, "frame >= 0 &&", "frame > 0 &&"),
    "tiles in the halo are skipped": (PANELS, "t0 * a.stride - a.padding >= limit", "t0 * a.stride >= limit"),
    "taps are not reversed": (PANELS, "a.taps - 1 - s.tap", "s.tap"),
    "one tap too many": (PANELS, "++tap < a.taps", "++tap <= a.taps"),
    "a share begins a step early": (PANELS, "begin = share * split < steps ? share * split : steps", "begin = share * split < steps ? share * split - (split > 0) : steps"),
    # epilogue
    "a lane's frames count one": (EPILOGUE, "first, second, counts[lane], from[0]", "first, second, 1.f, from[0]"),
    "a closed ReLU lets the gradient pass": (EPILOGUE, "!(wide(z[i]) <= 0.f)", "!(wide(z[i]) < 0.f)"),
    "dropout's scale is forgotten": (EPILOGUE, "v[i] *= a_.scale;", ""),
    "a row past the end is not masked": (EPILOGUE, "if (t >= tile_.end)", "if (t > tile_.end)"),
    "the last tile counts as a whole one": (EPILOGUE, "left < block ? left : block", "block"),
    # gradient of the weight
    "weight: one step too many under way": (WGRAD, "ptx::copy_wait<STAGES - 2>()", "ptx::copy_wait<STAGES - 1>()"),
    "weight: warps run apart": (WGRAD, "    __syncthreads();\n    issue", "    issue"),
    "weight: halves of dy change places": (WGRAD, "(matrix % 2 * kDyRows + matrix / 2 * 8 + row)", "(matrix / 2 * kDyRows + matrix % 2 * 8 + row)"),
    "weight: a segment is skipped": (WGRAD, "segment * kFrames < high", "segment * kFrames + kFrames < high"),
    "weight: a share is left out": (WGRAD, "for (int share = 0; share < shares", "for (int share = 1; share < shares"),
    "weight: panels are not shown to wgmma": (WGRAD90, "    ptx::fence_async_proxy();\n", ""),
    "weight: panels are full before they landed": (WGRAD90, "ptx::copy_wait<1>();\n      land", "ptx::copy_wait<2>();\n      land"),
    "weight: left strides change places": (WGRAD90, "dy + k * 256, 128, kDyRows * 16)", "dy + k * 256, kDyRows * 16, 128)"),
    "weight: right strides change places": (WGRAD90, "* 16, 128, rows * 16)", "* 16, rows * 16, 128)"),
    "weight: dilation is forgotten": (WGRAD90, "tap * a.dilation * 16, 128", "tap * 16, 128"),
    "weight: products are not waited for": (WGRAD90, "    ptx::wgmma_wait<1>();\n", ""),
    "weight: a stage is not waited for": (WGRAD90, "    ring.wait_full();\n", ""),
}  # fmt: skip

NOVOGRAD: dict[str, tuple[str, str, str]] = {
    "the last element of a tail is left out": (STEP, "j < min(i + kPack, count)", "j < min(i + kPack, count - 1)"),
    "a pack reaches beyond its run": (STEP, "i + kPack <= count; i += kStep", "i < count; i += kStep"),
    "the average's alignment is not looked at": (STEP, "|| aligned(mean))", "|| true)"),
    "sums are read before they are written": (STEP, "  __syncthreads();\n", ""),
    "a warp's sum is half of it": (STEP, "lanes < 32; lanes *= 2", "lanes < 16; lanes *= 2"),
    "partials of later tensors count": (STEP, "if (i >= first && i < end)", "if (i >= first)"),
    "v is read while another CTA writes it": (STEP, "old = a.old[run.tensor], own", "old = *run.at(kSquare, 0), own"),
    "v is kept by run": (STEP, "a.old[run.tensor] = *run", "a.old[blockIdx.x] = *run"),
    "a bad step is made": (STEP, "if (kind == kAverage || bad)", "if (kind == kAverage)"),
    "an infinite norm is good": (STEP, "!(norm < INFINITY)", "norm != norm"),
    "found_inf is not obeyed": (STEP, "(a.found != nullptr && *a.found != 0.f)", "false"),
    "the scale is forgotten": (STEP, "a.scale == nullptr ? 1.f : 1.f / *a.scale", "1.f"),
    "the norm is not bounded": (STEP, "if (norm + 1e-6f > a.clip_norm) inverse", "if (false) inverse"),
    "all groups have the first one's settings": (STEP, "a.settings + run.row[kGroup] * kSettings", "a.settings"),
    "counters are averaged": (STEP, "if (kind == kCopy) {", "if (false) {"),
    "a bad step averages nothing": (STEP, "if (kind == kUpdate && !a.has_averages) return;", "if (kind == kUpdate) return;"),
}  # fmt: skip
