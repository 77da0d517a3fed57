"""All rules of canonicalisation by the operator at their root, in the order in which they are tried."""

from firsttoken_compiler.passes import attention_patterns as attention
from firsttoken_compiler.passes import patterns
from firsttoken_compiler.passes.patterns import Rule

_LINEAR = patterns._linear_rules()

RULES: dict[str, tuple[Rule, ...]] = {
    "relax.take": (patterns.GATHER,),
    "relax.strided_slice": (patterns.ROW,),
    "relax.nn.rms_norm": (patterns._fused_norm(),),
    "relax.multiply": (patterns._decomposed_norm(), patterns._swiglu()),
    "relax.add": (attention.ROPE, *_LINEAR[:6], patterns._add()),
    "relax.matmul": (*_LINEAR[6:], *attention.attention_rules()),
    "npu.raw_rope": (attention.RAW_ROPE,),
    "npu.raw_attention": (attention.RAW_ATTENTION,),
    "TupleGetItem": (attention.TUPLE_ITEM,),
    "relax.reshape": (patterns.VIEW,),
    "relax.permute_dims": (patterns.VIEW,),
    "relax.expand_dims": (patterns.VIEW,),
    "relax.squeeze": (patterns.VIEW,),
    "relax.broadcast_to": (patterns.VIEW,),
}
