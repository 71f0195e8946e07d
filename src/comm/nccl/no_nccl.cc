// Stands in for nccl_world.cc in a build without NCCL's headers.
#include "mics/nccl_world.h"
#include "plan/check.h"

namespace mics {

NcclVersions nccl_versions() {
  NcclVersions versions;
  versions.problem =
      "torch_mics was built without the headers of NCCL and CUDA, which come with a torch for "
      "CUDA. "
      "Build it again with that torch.";
  return versions;
}

std::shared_ptr<NcclWorld> NcclWorld::create(const c10::intrusive_ptr<c10d::Store>& /*store*/,
                                             const NcclOptions& /*options*/) {
  MICS_CHECK(false, "NCCL needs a GPU and its libraries: ", nccl_versions().problem,
             " Use device_type=\"cpu\", or install a torch with CUDA.");
}

}  // namespace mics
