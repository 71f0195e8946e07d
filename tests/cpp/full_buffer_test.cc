#include "runtime/full_buffer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

namespace mics {
namespace {

TEST(FullBuffer, ViewsFollowTheMemory) {
  FullBuffer buffer(6, at::kFloat, at::kCPU, "blocks.0");
  const at::Tensor memory = at::empty({6});
  const at::Tensor first = buffer.view(0, {2, 2});
  const at::Tensor second = buffer.view(4, {2});
  for (const float value : {1.0F, 2.0F}) {
    buffer.attach(memory);
    buffer.view(0, {6}).fill_(value);
    EXPECT_TRUE(at::equal(first, at::full({2, 2}, value)));
    EXPECT_TRUE(at::equal(second, at::full({2}, value)));
    buffer.detach();
  }
}

TEST(FullBuffer, UseWhileDetachedRaisesWithTheUnitsName) {
  FullBuffer buffer(4, at::kFloat, at::kCPU, "blocks.0");
  const at::Tensor memory = at::empty({4});
  const at::Tensor view = buffer.view(0, {4});
  const auto expect_raises = [&](const std::function<void()>& use) {
    try {
      use();
      FAIL() << "did not raise";
    } catch (const std::exception& error) {
      EXPECT_NE(std::string(error.what()).find("unit \"blocks.0\" while it is sharded"),
                std::string::npos)
          << error.what();
    }
  };
  for (int round = 0; round < 2; ++round) {
    expect_raises([&] { (void)view.add(1); });
    expect_raises([&] { (void)at::cat({view, view}); });
    expect_raises([&] { (void)view.view({2, 2}).mm(at::ones({2, 2})); });
    expect_raises([&] { view.zero_(); });
    buffer.attach(memory);
    view.zero_();
    buffer.detach();
  }
}

TEST(FullBuffer, WritingOneViewMovesNoVersionOfAnother) {
  FullBuffer buffer(4, at::kFloat, at::kCPU, "u");
  const at::Tensor saved = buffer.view(0, {4});
  const int64_t before = saved._version();
  const at::Tensor memory = at::empty({4});
  buffer.attach(memory);
  buffer.view(0, {4}).fill_(3.0);
  EXPECT_EQ(saved._version(), before);
}

TEST(FullBuffer, EmptyBufferCanBeAttached) {
  FullBuffer buffer(0, at::kFloat, at::kCPU, "u");
  buffer.attach(at::empty({0}));
  EXPECT_TRUE(buffer.is_attached());
  EXPECT_EQ(buffer.view(0, {0, 3}).numel(), 0);
}

TEST(FullBuffer, ViewThatOutlivesItRaises) {
  at::Tensor view;
  {
    FullBuffer buffer(4, at::kFloat, at::kCPU, "blocks.0");
    view = buffer.view(0, {4});
    buffer.attach(at::zeros({4}));
  }
  try {
    (void)view.add(1);
    FAIL() << "did not raise";
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find("laid out anew or deleted"), std::string::npos);
  }
}

}  // namespace
}  // namespace mics
