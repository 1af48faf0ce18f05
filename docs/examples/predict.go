// Asks `digits` what an image of 8x8 pixels shows, over gRPC: predict [ADDRESS]
//
// In a folder with this file, with protoc, protoc-gen-go and protoc-gen-go-grpc installed:
//
//	go mod init example
//	P=../../proto M=Mgrpc_service.proto=example/inference,Mmodel_config.proto=example/inference
//	protoc -I $P --go_out=$M,module=example:. --go-grpc_out=$M,module=example:. $P/grpc_service.proto $P/model_config.proto
//	go mod tidy && go build -o predict
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log"
	"os"
	"time"

	"example/inference"

	"google.golang.org/grpc"
)

var pixels = []float32{
	0, 1, 8, 10, 14, 10, 0, 0,
	0, 12, 10, 6, 6, 16, 2, 0,
	0, 3, 0, 0, 7, 14, 1, 0,
	0, 0, 0, 0, 9, 11, 0, 0,
	0, 0, 0, 0, 2, 16, 1, 0,
	0, 0, 0, 0, 0, 8, 12, 0,
	0, 0, 4, 0, 2, 11, 9, 0,
	0, 0, 12, 16, 14, 12, 4, 0,
}

func main() {
	address := "localhost:8001"
	if len(os.Args) > 1 {
		address = os.Args[1]
	}
	connection, err := grpc.Dial(address, grpc.WithInsecure())
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	client := inference.NewGRPCInferenceServiceClient(connection)

	var raw bytes.Buffer
	binary.Write(&raw, binary.LittleEndian, pixels)
	request := &inference.ModelInferRequest{
		ModelName: "digits",
		Inputs: []*inference.ModelInferRequest_InferInputTensor{
			{Name: "x", Datatype: "FP32", Shape: []int64{1, 64}},
		},
		RawInputContents: [][]byte{raw.Bytes()},
	}
	limited, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	answer, err := client.ModelInfer(limited, request)
	if err != nil {
		log.Fatalf("predict: %v", err)
	}

	logits := make([]float32, len(answer.RawOutputContents[0])/4)
	binary.Read(bytes.NewReader(answer.RawOutputContents[0]), binary.LittleEndian, logits)
	best := 0
	for i, logit := range logits {
		if logit > logits[best] {
			best = i
		}
	}
	fmt.Printf("digit %d, logit %.3f\n", best, logits[best])
}
