// Detect objects in a PPM image with a file of: tools/export.py --format torchscript --postprocess --uint8
//
//   detect model.ts photo.ppm 0.5
//
// prints one line for each object: class id, score, x0 y0 x1 y1 in pixels of the photo.

#include <torch/script.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

// Read a binary PPM (P6, 8 bits, no comments) as uint8 RGB [1, 3, H, W].
torch::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, largest = 0;
  file >> magic >> width >> height >> largest;
  file.get();  // the single white space before the pixels
  if (!file || magic != "P6" || largest != 255 || width < 1 || height < 1)
    throw std::runtime_error(path + ": not an 8-bit binary PPM; convert it: magick photo.jpg photo.ppm");
  auto pixels = torch::empty({1, height, width, 3}, torch::kUInt8);
  if (!file.read(reinterpret_cast<char*>(pixels.data_ptr<uint8_t>()), pixels.numel()))
    throw std::runtime_error(path + ": the file is cut off; convert the photo again");
  return pixels.permute({0, 3, 1, 2});
}

// Read a whole number from the metadata, which is JSON.
int64_t number_in(const std::string& metadata, const std::string& name) {
  std::smatch match;
  if (!std::regex_search(metadata, match, std::regex("\"" + name + "\": (\\d+)")))
    throw std::runtime_error("no " + name + " in the model's metadata: write it with tools/export.py");
  return std::stoll(match[1]);
}

// Resize as the model's evaluation does: shorter side `size`, longer side at most about `max_size`.
torch::Tensor resize(const torch::Tensor& image, int64_t size, int64_t max_size) {
  const int64_t height = image.size(2), width = image.size(3);
  const double shorter = std::min(height, width), longer = std::max(height, width);
  if (longer / shorter * size > max_size) size = std::lrint(max_size * shorter / longer);
  if (size == static_cast<int64_t>(shorter)) return image;
  const auto other = static_cast<int64_t>(size * longer / shorter);
  const auto shape = height <= width ? std::vector<int64_t>{size, other} : std::vector<int64_t>{other, size};
  return at::_upsample_bilinear2d_aa(image, shape, /*align_corners=*/false);
}

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: detect model.ts photo.ppm threshold\n";
    return 2;
  }
  try {
    torch::NoGradGuard no_grad;
    torch::jit::ExtraFilesMap extra{{"detr.json", ""}};
    auto model = torch::jit::load(argv[1], torch::kCPU, extra);
    const std::string& metadata = extra["detr.json"];
    const auto photo = read_ppm(argv[2]);
    const auto input = resize(photo, number_in(metadata, "min_size"), number_in(metadata, "max_size"));

    auto found = model.forward({input.contiguous()}).toGenericDict();
    if (!found.contains("scores")) throw std::runtime_error("export the model with --postprocess --uint8");
    const auto scores = found.at("scores").toTensor()[0], labels = found.at("labels").toTensor()[0];
    const float fx = static_cast<float>(photo.size(3)) / input.size(3);  // from the input's pixels to the photo's
    const float fy = static_cast<float>(photo.size(2)) / input.size(2);
    const auto boxes = found.at("boxes").toTensor()[0] * torch::tensor({fx, fy, fx, fy});
    for (int64_t i = 0; i < scores.size(0); i++) {
      if (scores[i].item<float>() < std::stof(argv[3])) continue;
      std::printf("%lld %.4f", static_cast<long long>(labels[i].item<int64_t>()), scores[i].item<float>());
      for (int64_t k = 0; k < 4; k++) std::printf(" %.2f", boxes[i][k].item<float>());
      std::printf("\n");
    }
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
}
