// Registers the CPU kernels with torch. The schemas are defined in fused_mlp/ops/schemas.py, so
// that the ops exist without this library.

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(fused_mlp_kernels, CPU, m) {
  m.impl("normalize", TORCH_BOX(&fused_mlp::normalize));
  m.impl("normalize_evaluate", TORCH_BOX(&fused_mlp::normalize_evaluate));
  m.impl("normalize_backward", TORCH_BOX(&fused_mlp::normalize_backward));
  m.impl("linear_act", TORCH_BOX(&fused_mlp::linear_act));
  m.impl("linear_act_backward", TORCH_BOX(&fused_mlp::linear_act_backward));
  m.impl("linear_batch_norm_act", TORCH_BOX(&fused_mlp::linear_batch_norm_act));
  m.impl("linear_relu", TORCH_BOX(&fused_mlp::linear_relu));
  m.impl("linear_relu_backward", TORCH_BOX(&fused_mlp::linear_relu_backward));
  m.impl("batch_norm_act", TORCH_BOX(&fused_mlp::batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&fused_mlp::batch_norm_act_backward));
  m.impl("batch_norm_leaky_relu", TORCH_BOX(&fused_mlp::batch_norm_leaky_relu));
  m.impl("batch_norm_leaky_relu_backward", TORCH_BOX(&fused_mlp::batch_norm_leaky_relu_backward));
  m.impl("research_net", TORCH_BOX(&fused_mlp::research_net));
  m.impl("research_net_backward", TORCH_BOX(&fused_mlp::research_net_backward));
  m.impl("research_net_prepare", TORCH_BOX(&fused_mlp::research_net_prepare));
  m.impl("research_net_prepared", TORCH_BOX(&fused_mlp::research_net_prepared));
  m.impl("research_net_evaluate", TORCH_BOX(&fused_mlp::research_net_evaluate));
  m.impl("research_net_prepared_backward", TORCH_BOX(&fused_mlp::research_net_prepared_backward));
  m.impl("mlp_prepare", TORCH_BOX(&fused_mlp::mlp_prepare));
  m.impl("mlp_prepared", TORCH_BOX(&fused_mlp::mlp_prepared));
  m.impl("mlp_evaluate", TORCH_BOX(&fused_mlp::mlp_evaluate));
  m.impl("mlp_prepared_backward", TORCH_BOX(&fused_mlp::mlp_prepared_backward));
  m.impl("research_net_compiled", TORCH_BOX(&fused_mlp::research_net_compiled));
  m.impl("research_net_compiled_backward", TORCH_BOX(&fused_mlp::research_net_compiled_backward));
  m.impl("research_net_compiled_evaluate", TORCH_BOX(&fused_mlp::research_net_compiled_evaluate));
  m.impl("mlp_compiled", TORCH_BOX(&fused_mlp::mlp_compiled));
  m.impl("mlp_compiled_backward", TORCH_BOX(&fused_mlp::mlp_compiled_backward));
  m.impl("mlp_compiled_evaluate", TORCH_BOX(&fused_mlp::mlp_compiled_evaluate));
  m.impl("train_step_plan", TORCH_BOX(&fused_mlp::train_step_plan));
  m.impl("train_step", TORCH_BOX(&fused_mlp::train_step));
}
