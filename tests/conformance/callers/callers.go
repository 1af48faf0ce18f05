// Calls servers by turns (round_robin, no health checks, no retries asked for) from many goroutines until standard
// input ends, then prints how many calls were answered and how many failed, by text, as JSON.
//
// callers ADDRESS,ADDRESS... REQUEST_FILE CALLERS, where the file has the message of a ModelInfer. grpc-go 1.33 or later.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/ioutil"
	"os"
	"strconv"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

type bytesCodec struct{}

func (bytesCodec) Marshal(v interface{}) ([]byte, error) { return *v.(*[]byte), nil }
func (bytesCodec) Unmarshal(data []byte, v interface{}) error {
	*v.(*[]byte) = data
	return nil
}
func (bytesCodec) Name() string { return "proto" }

type outcome struct {
	Ok     int            `json:"ok"`
	Failed map[string]int `json:"failed"`
}

func main() {
	request, err := ioutil.ReadFile(os.Args[2])
	callers, bad := strconv.Atoi(os.Args[3])
	if err != nil || bad != nil {
		panic(fmt.Sprint(err, bad))
	}
	addresses := []resolver.Address{}
	for _, address := range strings.Split(os.Args[1], ",") {
		addresses = append(addresses, resolver.Address{Addr: address})
	}
	names := manual.NewBuilderWithScheme("list")
	names.InitialState(resolver.State{Addresses: addresses})
	channel, err := grpc.Dial("list:///servers", grpc.WithInsecure(), grpc.WithResolvers(names), grpc.WithBlock(),
		grpc.WithDefaultServiceConfig(`{"loadBalancingPolicy":"round_robin"}`))
	if err != nil {
		panic(err)
	}
	over := make(chan struct{})
	var lock sync.Mutex
	found := outcome{Failed: map[string]int{}}
	var all sync.WaitGroup
	for i := 0; i < callers; i++ {
		all.Add(1)
		go func() {
			defer all.Done()
			for {
				select {
				case <-over:
					return
				default:
				}
				var answer []byte
				err := channel.Invoke(context.Background(), "/inference.GRPCInferenceService/ModelInfer", &request,
					&answer, grpc.ForceCodec(bytesCodec{}))
				lock.Lock()
				if err == nil {
					found.Ok++
				} else {
					found.Failed[err.Error()]++
				}
				lock.Unlock()
			}
		}()
	}
	io.Copy(ioutil.Discard, os.Stdin)
	close(over)
	all.Wait()
	said, _ := json.Marshal(found)
	fmt.Println(string(said))
}
