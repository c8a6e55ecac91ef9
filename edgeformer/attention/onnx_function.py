"""
Block-DSA in ONNX: one node `ai.edgeformer::DSA`, and a model-local function of the same name in standard operators.

A runtime with our library takes the node; any other inlines the function. The function is rule 0 as a masked dense
attention: the same numbers at dense cost, without a sort. It cannot express the other rules or a clamp. A function
cannot ask whether an operand is there, so a model with a position bias carries a function that has one. One difference
is left: a NaN in a token that was not kept reaches the rows that did not look at it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx
from onnx import defs, parser
from onnxscript import opset20 as standard, values

from .composite import inexpressible

DOMAIN, NAME, VERSION = "ai.edgeformer", "DSA", 1
OPSET = 20
LENGTHS, POSITION = ("q_len", "kv_len"), "position_bias"
OPERANDS = ("q", "k", "v", "wq", "wk", "dist_bias", "sink_bias", "theta", *LENGTHS, POSITION)
INTEGERS = {
    "block_q": 64,
    "block_k": 64,
    "rule": 0,
    "min_blocks": 1,
    "max_blocks": 0,
    "force_diag": 1,
    "n_sink": 0,
    "causal": 0,
    "q_offset": 0,
    "select_per_kv": 0,
    "dense_below": 0,
    "compute": 0,
}

_LOGITS = "  logits = MatMul (q_masked, k_t)\n"
_BIASED_LOGITS = """
  products = MatMul (q_masked, k_t)
  here = Add (t, offset)
  here_col = Unsqueeze (here, axis1)
  away = Sub (u, here_col)
  columns = Shape <start = 1, end = 2> (position_bias)
  far = Div (columns, two)
  far_down = Neg (far)
  away_low = Max (away, far_down)
  away_in = Min (away_low, far)
  away_at = Add (away_in, far)
  by_distance = Gather <axis = 1> (position_bias, away_at)
  logits = Add (products, by_distance)
"""
_BODY = """
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  axis0 = Constant <value_ints = [0]> ()
  axis1 = Constant <value_ints = [1]> ()
  axis2 = Constant <value_ints = [2]> ()
  last = Constant <value_ints = [-1]> ()
  outer = Constant <value_ints = [1, 3]> ()
  none = Constant <value_float = 0.0> ()
  unit = Constant <value_float = 1.0> ()
  never = Constant <value_float = -1e30> ()
  lowest = Constant <value_float = -3.4e38> ()
  highest = Constant <value_float = 3e38> ()
  tiny = Constant <value_float = 1e-37> ()
  nowhere = Constant <value_int = 1073741824> ()
  nowhere_before = Sub (nowhere, one)
  bq = Constant <value_int: int = @block_q> ()
  bk = Constant <value_int: int = @block_k> ()
  offset_given = Constant <value_int: int = @q_offset> ()
  sinks_kept = Constant <value_int: int = @n_sink> ()
  dense_rows = Constant <value_int: int = @dense_below> ()
  causal_int = Constant <value_int: int = @causal> ()
  free = Equal (causal_int, zero)
  diag_int = Constant <value_int: int = @force_diag> ()
  diag = Cast <to = 9> (diag_int)
  per_kv_int = Constant <value_int: int = @select_per_kv> ()
  per_kv = Cast <to = 9> (per_kv_int)
  least_int = Constant <value_int: int = @min_blocks> ()
  least = Cast <to = 9> (least_int)
  scale_given = Constant <value_float: float = @scale> ()

  # Sizes, as vectors of one element (for shapes) and as scalars.
  b_1 = Shape <start = 0, end = 1> (q)
  hq_1 = Shape <start = 1, end = 2> (q)
  nq_1 = Shape <start = 2, end = 3> (q)
  d_1 = Shape <start = 3, end = 4> (q)
  hkv_1 = Shape <start = 1, end = 2> (k)
  nk_1 = Shape <start = 2, end = 3> (k)
  hq = Squeeze (hq_1)
  hkv = Squeeze (hkv_1)
  nq = Squeeze (nq_1)
  nk = Squeeze (nk_1)
  nq_up = Add (nq, bq)
  nq_end = Sub (nq_up, one)
  q_blocks = Div (nq_end, bq)
  nk_up = Add (nk, bk)
  nk_end = Sub (nk_up, one)
  k_blocks = Div (nk_end, bk)

  # Where the queries start; below 0 they are the last of the keys' rows.
  rows_before = Sub (nk, nq)
  are_last = Less (offset_given, zero)
  offset = Where (are_last, rows_before, offset_given)

  # Positions t, u of rows; blocks i, j; the block of each row.
  t = Range (zero, nq, one)
  u = Range (zero, nk, one)
  t_block = Div (t, bq)
  u_block = Div (u, bk)
  i = Range (zero, q_blocks, one)
  j = Range (zero, k_blocks, one)
  i_col = Unsqueeze (i, axis1)
  q_len64 = Cast <to = 7> (q_len)
  kv_len64 = Cast <to = 7> (kv_len)
  q_len2 = Unsqueeze (q_len64, axis1)
  kv_len2 = Unsqueeze (kv_len64, axis1)
  t_valid = Less (t, q_len2)
  u_valid = Less (u, kv_len2)

  # Padding may hold anything, NaN included; each query head sees its kv head.
  t_valid4 = Unsqueeze (t_valid, outer)
  u_valid4 = Unsqueeze (u_valid, outer)
  q_clean = Where (t_valid4, q, none)
  k_clean = Where (u_valid4, k, none)
  v_clean = Where (u_valid4, v, none)
  head = Range (zero, hq, one)
  head_scaled = Mul (head, hkv)
  head_kv = Div (head_scaled, hq)
  k_head = Gather <axis = 1> (k_clean, head_kv)
  v_head = Gather <axis = 1> (v_clean, head_kv)

  # Pool: the mean of each block's valid rows, as a product with the block's membership.
  i_of_t = Equal (i_col, t_block)
  t_valid3 = Unsqueeze (t_valid, axis1)
  in_i = And (i_of_t, t_valid3)
  in_i_float = Cast <to = 1> (in_i)
  in_i4 = Unsqueeze (in_i_float, axis1)
  i_count = ReduceSum (in_i4, last)
  i_some = Max (i_count, unit)
  q_sum = MatMul (in_i4, q_clean)
  q_mean = Div (q_sum, i_some)
  j_col = Unsqueeze (j, axis1)
  j_of_u = Equal (j_col, u_block)
  u_valid3 = Unsqueeze (u_valid, axis1)
  in_j = And (j_of_u, u_valid3)
  in_j_float = Cast <to = 1> (in_j)
  in_j4 = Unsqueeze (in_j_float, axis1)
  j_count = ReduceSum (in_j4, last)
  j_some = Max (j_count, unit)
  k_sum = MatMul (in_j4, k_head)
  k_mean = Div (k_sum, j_some)

  # Candidates (batch, 1, i, j): blocks with a valid key, not wholly in the future.
  first = Mul (i, bq)
  first_i = Add (first, offset)
  first_col = Unsqueeze (first_i, axis1)
  rows_i = Cast <to = 7> (i_count)
  past_i = Add (first_col, rows_i)
  last_i = Sub (past_i, one)
  j_start = Mul (j, bk)
  j_end = Add (j_start, bk)
  started = LessOrEqual (j_start, last_i)
  past_or_free = Or (started, free)
  kv_len4 = Unsqueeze (kv_len2, outer)
  j_valid = Less (j_start, kv_len4)
  candidate = And (j_valid, past_or_free)

  # Score.
  zq = MatMul (q_mean, wq)
  zk = MatMul (k_mean, wk)
  zk_t = Transpose <perm = [0, 1, 3, 2]> (zk)
  z_pooled = MatMul (zq, zk_t)
  reach_2 = Shape <start = 1, end = 2> (dist_bias)
  two = Constant <value_ints = [2]> ()
  reach = Div (reach_2, two)
  reach_down = Neg (reach)
  first_block = Div (first_col, bk)
  distance = Sub (j, first_block)
  distance_low = Max (distance, reach_down)
  distance_in = Min (distance_low, reach)
  distance_at = Add (distance_in, reach)
  distance_bias = Gather <axis = 1> (dist_bias, distance_at)
  s_1 = Shape <start = 1, end = 2> (sink_bias)
  no_sink_shape = Concat <axis = 0> (hq_1, axis1)
  no_sink = Expand (none, no_sink_shape)
  sink_or_none = Concat <axis = 1> (sink_bias, no_sink)
  sink_at = Min (j, s_1)
  sink_of_j = Gather <axis = 1> (sink_or_none, sink_at)
  sink3 = Unsqueeze (sink_of_j, axis1)
  z_dist = Add (z_pooled, distance_bias)
  z_sum = Add (z_dist, sink3)
  z_capped = Min (z_sum, highest)
  z_nan = IsNaN (z_sum)
  minus_inf = Constant <value = float {-inf}> ()
  z_number = Where (z_nan, minus_inf, z_capped)
  z = Where (candidate, z_number, minus_inf)

  # Mass (batch, kv head, group, i, j).
  z_top = ReduceMax (z, last)
  z_top_finite = Max (z_top, lowest)
  z_shifted = Sub (z, z_top_finite)
  e = Exp (z_shifted)
  e_sum = ReduceSum (e, last)
  e_some = Max (e_sum, tiny)
  p = Div (e, e_some)
  qb_1 = Unsqueeze (q_blocks, axis0)
  kb_1 = Unsqueeze (k_blocks, axis0)
  group_1 = Div (hq_1, hkv_1)
  grouped_shape = Concat <axis = 0> (b_1, hkv_1, group_1, qb_1, kb_1)
  p_grouped = Reshape (p, grouped_shape)
  p_shared = ReduceMean (p_grouped, axis2)
  mass = Where (per_kv, p_shared, p_grouped)

  # Keep: theta, the forced blocks, the heaviest block if there is none else.
  theta_shape = Concat <axis = 0> (axis1, hkv_1, last, axis1, axis1)
  theta5 = Reshape (theta, theta_shape)
  over = GreaterOrEqual (mass, theta5)
  heads_shape = Concat <axis = 0> (b_1, hq_1, qb_1, kb_1)
  over4 = Reshape (over, heads_shape)
  mass4 = Reshape (mass, heads_shape)
  ends_after = Greater (j_end, first_col)
  overlaps = And (started, ends_after)
  forced_diag = And (overlaps, diag)
  forced_sink = Less (j, sinks_kept)
  forced = Or (forced_diag, forced_sink)
  over_or_forced = Or (over4, forced)
  dense = LessOrEqual (nk, dense_rows)
  wanted = Or (over_or_forced, dense)
  found = And (wanted, candidate)
  found_float = Cast <to = 1> (found)
  found_any = ReduceMax (found_float, last)
  found_bool = Cast <to = 9> (found_any)
  found_none = Not (found_bool)
  add_one = And (found_none, least)
  heaviest = ArgMax <axis = -1, keepdims = 1> (mass4)
  is_heaviest = Equal (j, heaviest)
  added = And (is_heaviest, add_one)
  found_or_added = Or (found, added)
  keep = And (found_or_added, candidate)

  # The mask of tokens is part of the product: each query carries its block's bias for every key block, each key says
  # which block it is in and whether it is valid. No pass over the scores, no mask of their size. -1e30 is out of reach
  # of any logit and never NaN.
  block_bias = Where (keep, none, never)
  row_bias = Gather <axis = 2> (block_bias, t_block)
  valid_bias_shape = Concat <axis = 0> (b_1, hq_1, nq_1, axis1)
  valid_bias = Expand (never, valid_bias_shape)
  u_in_block = Transpose <perm = [1, 0]> (j_of_u)
  u_block_float = Cast <to = 1> (u_in_block)
  u_block_shape = Concat <axis = 0> (b_1, hq_1, nk_1, kb_1)
  u_block4 = Expand (u_block_float, u_block_shape)
  u_invalid = Not (u_valid4)
  u_invalid_float = Cast <to = 1> (u_invalid)
  u_invalid_shape = Concat <axis = 0> (b_1, hq_1, nk_1, axis1)
  u_invalid4 = Expand (u_invalid_float, u_invalid_shape)

  # Attend. A row sees something if its first kept block starts before it.
  d_float = Cast <to = 1> (d_1)
  d_root = Sqrt (d_float)
  scale_default = Div (unit, d_root)
  scale_missing = Equal (scale_given, none)
  scale_used = Where (scale_missing, scale_default, scale_given)
  q_scaled = Mul (q_clean, scale_used)
  q_masked = Concat <axis = -1> (q_scaled, row_bias, valid_bias)
  k_masked = Concat <axis = -1> (k_head, u_block4, u_invalid4)
  k_t = Transpose <perm = [0, 1, 3, 2]> (k_masked)
  logits = MatMul (q_masked, k_t)
  position = Add (t, offset)
  logits_seen = If (free) <
    then_branch = everything () => (all_logits) { all_logits = Identity (logits) },
    else_branch = the_past () => (past_logits) {
      column = Unsqueeze (position, axis1)
      seen = LessOrEqual (u, column)
      causal_bias = Where (seen, none, never)
      past_logits = Add (logits, causal_bias)
    }
  >
  weights = Softmax <axis = -1> (logits_seen)
  mixed = MatMul (weights, v_head)
  keep_start = Where (keep, j_start, nowhere)
  keep_first = ReduceMin <keepdims = 0> (keep_start, last)
  row_first = Gather <axis = 2> (keep_first, t_block)
  row_limit = Where (free, nowhere_before, position)
  row_sees = LessOrEqual (row_first, row_limit)
  t_valid_row = Unsqueeze (t_valid, axis1)
  row_used = And (row_sees, t_valid_row)
  row_used4 = Unsqueeze (row_used, last)
  out = Where (row_used4, mixed, none)
"""


@cache
def schema() -> defs.OpSchema:
    """The node's signature, known to the exporter and to shape inference from the first call on."""
    parameter, attribute = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
    optional = defs.OpSchema.FormalParameterOption.Optional
    inputs = [parameter(name, "T") for name in OPERANDS[:-3]]
    inputs += [parameter(name, "N", param_option=optional) for name in LENGTHS]
    inputs += [parameter(POSITION, "T", param_option=optional)]
    attributes = [attribute(name, onnx.helper.make_attribute(name, value)) for name, value in INTEGERS.items()]
    made = defs.OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        inputs=inputs,
        outputs=[parameter("out", "T")],
        type_constraints=[("T", ["tensor(float)"], ""), ("N", ["tensor(int32)"], "")],
        attributes=[*attributes, attribute("scale", onnx.helper.make_attribute("scale", 0.0))],
    )
    # With a registered schema, shape inference no longer looks into the function; the quantizer needs the type.
    made.set_type_and_shape_inference_function(lambda context: context.set_output_type(0, context.get_input_type(0)))
    defs.register_schema(made)
    return made


@cache
def function(biased: bool = False) -> onnx.FunctionProto:
    """The body in standard operators, with every operand present; the position bias if `biased`."""
    head = ", ".join([*(f"{name}: int = {value}" for name, value in INTEGERS.items()), "scale: float = 0.0"])
    signature = f"{NAME} <{head}> ({', '.join(OPERANDS if biased else OPERANDS[:-1])}) => (out)"
    body = _BODY.replace(_LOGITS, _BIASED_LOGITS) if biased else _BODY
    return parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]> {signature} {{{body}}}')


def present(proto: onnx.ModelProto) -> bool:
    return bool(_nodes(proto))


def biased(proto: onnx.ModelProto) -> bool:
    """Whether the model's DSA nodes have a position bias. Raises ValueError where only some do."""
    found = {node.input[-1] != "" and len(node.input) == len(OPERANDS) for node in _nodes(proto)}
    if len(found) > 1:
        raise ValueError("a model has one function DSA: give all of its nodes a position_bias, or none")
    return found == {True}


def _nodes(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.domain == DOMAIN and node.op_type == NAME]


def attach(proto: onnx.ModelProto) -> None:
    """Adds the function to a model that has DSA nodes; others stay as they are."""
    if present(proto) and not any(f.domain == DOMAIN and f.name == NAME for f in proto.functions):
        proto.functions.append(function(biased(proto)))


def node(  # the torch operator's signature: the exporter reads names, order and types off it
    q: Any,
    k: Any,
    v: Any,
    wq: Any,
    wk: Any,
    dist_bias: Any,
    sink_bias: Any,
    theta: Any,
    q_len: Any = None,
    kv_len: Any = None,
    position_bias: Any = None,
    block_q: int = 64,
    block_k: int = 64,
    rule: int = 0,
    min_blocks: int = 1,
    max_blocks: int = 0,
    force_diag: int = 1,
    n_sink: int = 0,
    causal: int = 0,
    q_offset: int = 0,
    select_per_kv: int = 0,
    dense_below: int = 0,
    compute: int = 0,
    scale: float = 0.0,
) -> Any:
    """The node for one call of the torch operator; missing lengths are written out as full ones."""
    given = locals()
    if reason := inexpressible(rule=rule, min_blocks=min_blocks, max_blocks=max_blocks):
        raise ValueError(reason)
    lengths = [_full(x) if length is None else length for x, length in ((q, q_len), (k, kv_len))]
    schema()
    dsa = values.Opset(DOMAIN, VERSION).DSA
    attributes = {name: given[name] for name in (*INTEGERS, "scale")}
    last = [] if position_bias is None else [position_bias]
    return dsa(q, k, v, wq, wk, dist_bias, sink_bias, theta, *lengths, *last, **attributes)


def _full(x: Any) -> Any:
    """[batch]: every row of x is valid. An inlined function body cannot ask whether an input is there."""
    rows = standard.Cast(standard.Shape(x, start=2, end=3), to=onnx.TensorProto.INT32)
    return standard.Expand(rows, standard.Shape(x, start=0, end=1))
