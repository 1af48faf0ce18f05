// Asks `digits` what an image of 8x8 pixels shows, over gRPC: predict [ADDRESS]
//
// With protoc and gRPC's plugin (Debian: protobuf-compiler-grpc libgrpc++-dev):
//   protoc -I ../../proto --cpp_out=. --grpc_out=. --plugin=protoc-gen-grpc=$(which grpc_cpp_plugin) \
//       ../../proto/grpc_service.proto ../../proto/model_config.proto
//   g++ -std=c++17 -I. predict.cc *.pb.cc -o predict $(pkg-config --cflags --libs grpc++ protobuf)
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

#include "grpc_service.grpc.pb.h"

const std::vector<float> kPixels{
    0, 1,  8,  10, 14, 10, 0,  0,  //
    0, 12, 10, 6,  6,  16, 2,  0,  //
    0, 3,  0,  0,  7,  14, 1,  0,  //
    0, 0,  0,  0,  9,  11, 0,  0,  //
    0, 0,  0,  0,  2,  16, 1,  0,  //
    0, 0,  0,  0,  0,  8,  12, 0,  //
    0, 0,  4,  0,  2,  11, 9,  0,  //
    0, 0,  12, 16, 14, 12, 4,  0,
};

int main(int count, char** arguments) {
  const char* address = count > 1 ? arguments[1] : "localhost:8001";
  auto channel = grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
  auto stub = inference::GRPCInferenceService::NewStub(channel);

  inference::ModelInferRequest request;
  request.set_model_name("digits");
  auto* x = request.add_inputs();
  x->set_name("x");
  x->set_datatype("FP32");
  x->add_shape(1);
  x->add_shape(64);
  // On a little-endian machine a tensor's bytes are an array's.
  request.add_raw_input_contents(kPixels.data(), kPixels.size() * sizeof(float));

  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(2));
  inference::ModelInferResponse answer;
  const grpc::Status status = stub->ModelInfer(&context, request, &answer);
  if (!status.ok()) {
    std::fprintf(stderr, "predict: status %d: %s\n", status.error_code(), status.error_message().c_str());
    return 1;
  }

  const std::string& raw = answer.raw_output_contents(0);
  std::vector<float> logits(raw.size() / sizeof(float));
  std::memcpy(logits.data(), raw.data(), raw.size());
  const auto best = std::max_element(logits.begin(), logits.end());
  std::printf("digit %ld, logit %.3f\n", static_cast<long>(best - logits.begin()), *best);
}
