"""All rules of canonicalisation by the operator at their root, in the order in which they are tried."""

from firsttoken_compiler.passes import attention_patterns as attention
from firsttoken_compiler.passes import block_gather, host, patterns, quantised_gather, quantised_patterns, stored_conv
from firsttoken_compiler.passes import vector_patterns as vector
from firsttoken_compiler.passes import vision_patterns as vision
from firsttoken_compiler.passes.elementwise import MAKERS
from firsttoken_compiler.passes.layer_norm_patterns import LAYER_NORM
from firsttoken_compiler.passes.patterns import Rule

RULES: dict[str, tuple[Rule, ...]] = {
    "relax.take": (patterns.GATHER, patterns.TURNED_GATHER,),
    "relax.strided_slice": (patterns.PART, patterns.ROW, patterns.COLUMNS),
    "relax.nn.rms_norm": (patterns.FUSED_NORM,),
    "relax.multiply": (patterns.DECOMPOSED_NORM, patterns.SWIGLU, LAYER_NORM),
    "relax.divide": (LAYER_NORM,),
    "relax.nn.layer_norm": (LAYER_NORM,),
    "relax.nn.softmax": (vector.SOFTMAX,),
    "relax.nn.log_softmax": (vector.SOFTMAX,),
    "relax.add": (vision.CONV, attention.ROPE, *patterns.LINEAR_SUMS, LAYER_NORM),
    "relax.matmul": (*patterns.LINEAR, *attention.attention_rules(), vector.OUTER),
    "relax.concat": (attention.APPEND, vision.CONCAT),
    "relax.astype": (patterns.VIEW,),
    "relax.nn.relu": (vision.BATCH_NORM,),
    "npu.raw_batch_norm": (vision.BATCH_NORM,),
    "npu.raw_conv": (vision.CONV,),
    "npu.raw_pool": (vision.POOL,),
    "npu.raw_host": (host.RAW_HOST,),
    "npu.raw_rope": (attention.RAW_ROPE,),
    "npu.raw_attention": (attention.RAW_ATTENTION,),
    "TupleGetItem": (attention.TUPLE_ITEM,),
    "relax.reshape": (patterns.VIEW,),
    "relax.permute_dims": (patterns.VIEW,),
    "relax.expand_dims": (patterns.VIEW,),
    "relax.squeeze": (patterns.VIEW,),
    "relax.broadcast_to": (vector.BROADCAST,),
}
for _name in ("relax.matmul", "relax.add", "relax.multiply", "npu.raw_nbits"):
    RULES[_name] = (quantised_patterns.STORED_PRODUCT, *RULES.get(_name, ()))
for _name in ("npu.raw_quantise", "npu.raw_dequantise"):
    RULES[_name] = (quantised_patterns.REQUANTISE,)
for _name in ("relax.take", "npu.raw_block_gather", "npu.raw_dequantise"):
    RULES[_name] = (quantised_gather.STORED_GATHER, *RULES.get(_name, ()))
for _name in ("npu.raw_conv", "relax.add"):
    RULES[_name] = (stored_conv.STORED_CONV, *RULES[_name])
RULES["relax.take"] = (block_gather.BLOCK_GATHER, *RULES["relax.take"])
for _name in MAKERS:
    if _name != "broadcast_to":
        RULES[f"relax.{_name}"] = (*RULES.get(f"relax.{_name}", ()), vector.ELEMENTWISE)
RULES["relax.add"] = (*RULES["relax.add"], patterns.ADD)
for _name in ("sum", "mean", "max", "min"):
    RULES[f"relax.{_name}"] = (vector.FOLD,)
