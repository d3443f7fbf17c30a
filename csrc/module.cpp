// lora_fused._C: what was built and what is in use. Loading it registers the operators' CPU kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/isa.h"

namespace py = pybind11;
using namespace lora_fused;

PYBIND11_MODULE(_C, m) {
  isa_in_use();  // a wrong LORA_FUSED_ISA is an error now, not at the first call
  m.def("isa", [] { return std::string(isa_name(isa_in_use())); }, "Instruction set in use.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < kIsaCount; ++i)
      if (isa_usable(static_cast<Isa>(i))) names.push_back(isa_name(static_cast<Isa>(i)));
    return names;
  }, "Instruction sets usable on this CPU.");
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = LORA_FUSED_COMPILER;
    info["torch"] = LORA_FUSED_BUILD_TORCH;
    return info;
  }, "Compiler and torch of the build.");
}
