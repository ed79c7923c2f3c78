#include "cpu/text.h"

#include <torch/csrc/stable/library.h>

#include <locale>
#include <sstream>

namespace fused_mlp {

std::vector<double> numbers_of(const std::string& text) {
  std::istringstream in(text);
  in.imbue(std::locale::classic());  // whatever the program's locale takes for a decimal point
  std::vector<double> numbers;
  while (in >> std::ws, !in.eof()) {
    double number;
    STD_TORCH_CHECK(in >> number, "fused_mlp: expected numbers separated by blanks, but got '",
                    text, "'");
    numbers.push_back(number);
  }
  return numbers;
}

}  // namespace fused_mlp
